"""The main job: a source in, a verified bundle out."""

from __future__ import annotations

import contextlib
import datetime
import functools
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompile import (
    __version__,
    bundle,
    calibration,
    calibration_data,
    frontend,
    measure,
    oracle,
    qdq,
    registry,
    remote,
    report,
    stats,
)
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing, InputError, ParityError
from edgecompile.files import check_new_folder, new_folder, write_atomic
from edgecompile.frontend import Source
from edgecompile.graph import Graph
from edgecompile.oracle import OutputError, Outputs
from edgecompile.pipeline import ANY_DROP, Drop, Pipeline, Step, Trace
from edgecompile.target import BoardTarget, Engine, EngineManifest, LayerTime, Target

if TYPE_CHECKING:
    from edgecompile.calibration_data import CalibrationData, Preprocess

# Largest difference between the engine and its reference, relative to the largest value of the output. In fp32,
# different kernels sum in different orders; the deepest detectors need the most room. Below fp32 the passes keep
# budgets of their own, and this only tells an engine that is less precise from one that is wrong.
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1, "int8": 0.5}
# Least signal-to-noise ratio in dB of an engine that an option of its target makes an approximation, unless another is
# given. A layer whose activations are rounded to 8 bits leaves about 40 dB; a hundred in a row, 20.
APPROXIMATE = 20.0


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        target: name of the target.
        precision: one of the target's pipelines.
        passes: a pass spec instead of the target's own; ``""`` runs no pass.
        strict: stop when a pass fails, instead of going on without it.
        bench: measure latency, layer times and, where the user's file defines ``evaluate(run)``, accuracy.
        seed: of random weights and probe inputs.
        target_options: options of the target, as text or typed.
        seconds: measuring time in all.
        calib: calibration data, see :func:`edgecompile.calibration_data.open_data`; else ``calibration_data()`` of the
            model's file.
        preprocess: how images become inputs, for a folder of images.
        min_snr: least signal-to-noise ratio in dB that the passes of the precision may leave, None for their own; and
            that an option of the target may leave, None for :data:`APPROXIMATE`.
        max_drop: most that the score of ``evaluate(run)`` may fall by the passes of the precision, None for their own.
        calib_memory: bytes that calibration may take for activations, None for the pass's own.
        force: keep an engine of lower precision even if it is slower than that of the precision it came from.
        prepare: do everything but the target's own build, which another machine will do.
        before: passes that the source has been through, where it is a bundle.
        prune: share of the measured latency that pruning is to leave, None for no such pruning.
        prune_params: the same of the parameters.
        device: board to build for, and to compare and measure on, see :func:`edgecompile.remote.open_target`.
    """

    target: str = "ort"
    precision: str = "fp32"
    passes: str | None = None
    strict: bool = False
    bench: bool = True
    seed: int = 0
    target_options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    calib: str | None = None
    preprocess: Preprocess | None = None
    min_snr: float | None = None
    max_drop: Drop | None = None
    calib_memory: int | None = None
    force: bool = False
    prepare: bool = False
    before: str = ""
    prune: float | None = None
    prune_params: float | None = None
    device: str = ""


def pipeline_spec(options: Options) -> str:
    """The pass spec that these options mean.

    Raises:
        InputError: the target has no such precision.
    """
    spec = _target_spec(options) if options.passes is None else options.passes
    goals = {"latency": options.prune, "params": options.prune_params}
    given = [f"{name}={share:g}" for name, share in goals.items() if share is not None]
    if not given:
        return spec
    passes = list(Pipeline.parse(spec).passes) if spec else []
    if any(p.name == "prune" for p in passes):
        raise InputError("pruning is asked for twice", "by --passes and by --prune", "leave one of them out")
    more = ["score=reconstruction", "repair=true"] if options.calib else []
    place = next((i for i, p in enumerate(passes) if not p.exact or p.name == "legalize"), len(passes))
    prune = Pipeline.parse(f"prune{{{','.join(given + more)}}}").passes
    return str(Pipeline((*passes[:place], *prune, *passes[place:])))


def _target_spec(options: Options) -> str:
    target = registry.target(options.target)
    if options.precision not in target.pipelines:
        others = [n for n in registry.target_names() if options.precision in registry.target(n).pipelines]
        raise InputError(
            f"target {options.target} cannot build {options.precision}",
            f"it builds {', '.join(target.pipelines)}",
            f"choose another --precision{''.join(f', or --target {n}' for n in others)}",
        )
    return target.pipelines[options.precision]


def check(source: str, out: Path, options: Options) -> None:
    """Refuse what can be seen to be impossible before the source is loaded.

    Raises:
        InputError: the target has no such precision or option, there is no such pass, the bundle cannot be written, or
            a score is to be kept and the source cannot have one.
    """
    if Path(source).is_dir() and not bundle.is_bundle(source):
        return  # loading it says what is wrong
    pipeline = _pipeline(options)
    if not options.device:  # a board may have what is not installed here
        with contextlib.suppress(EnvironmentMissing):  # it is told when it is needed: the source may lack more
            registry.target(options.target).check(options.target_options)
    _require_replaceable(out)
    check_new_folder(out)
    if not _keeps_score(pipeline):
        return
    path = Path(re.sub(r"\.py:[^/]*$", ".py", source))
    if path.suffix == ".py" and path.is_file():
        content = path.read_bytes()
        if b"evaluate" in content or b"import *" in content:
            return
    elif path.suffix == ".py":
        return  # loading it says what is wrong
    raise _no_score(source)


def _pipeline(options: Options) -> Pipeline:
    spec = pipeline_spec(options)
    return _with_budgets(Pipeline.parse(spec) if spec else Pipeline(()), options)


def _keeps_score(pipeline: Pipeline) -> bool:
    return any(getattr(p, "max_drop", ANY_DROP).limited for p in pipeline.passes)


def _no_score(source: str) -> InputError:
    return InputError(
        "--max-drop needs a score", f"{source} defines no evaluate(run)",
        "write it in model.py: def evaluate(run): return (run(images).argmax(1) == labels).float().mean(); run takes "
        "what example_inputs() gives; or keep a --min-snr instead",
    )  # fmt: skip


def default_output(name: str) -> Path:
    """Where a bundle goes that nobody has placed: ``build/NAME``, e.g. ``build/model_small`` for ``model.py:small``."""
    stem, _, factory = name.partition(":")
    return Path("build") / "_".join(filter(None, (Path(stem).stem, factory)))


def _require_replaceable(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not bundle.is_bundle(out):
        raise InputError(f"{out} holds something that is not a bundle", "it would be replaced", "choose another -o")


def build(source: Source, out: Path, options: Options, progress: Callable[[str], None] | None = None) -> Bundle:
    """Run the passes, lower, prove parity, evaluate, measure, and write the bundle as a whole or not at all.

    An engine of lower precision must be faster than that of the graph it was made from. If it is not, the faster one is
    built in its place; the report says so first, and that of the slower one lies beside it.

    Args:
        source: what :func:`edgecompile.frontend.load` returned.
        out: folder of the bundle; a bundle already there is replaced.
        options: how to build.
        progress: called with what is being done.

    Raises:
        InputError: an option or the model cannot be used, the user's ``evaluate(run)`` fails, or int8 is asked for and
            there is no calibration data.
        ParityError: the engine does not compute what the source does; nothing is written.
        PassError: a pass failed, with ``options.strict``.
        EnvironmentMissing: the target's runtime is missing.
    """
    say = progress or (lambda _: None)
    _require_replaceable(out)
    with remote.open_target(options.target, options.device, say) as target:
        source = _fixed(source) if target.static else source
        try:
            return _build(source, out, options, say, target)
        except _Slower as slower:
            say(f"{slower.why}: building fp32 instead")
            return _build(source, out, replace(options, precision="fp32"), say, target, slower)


def _fixed(source: Source) -> Source:
    """The source with inputs of one shape each, that of the example inputs."""
    shapes = {name: list(value.shape) for name, value in source.feeds[0].items()}
    moved = {str(t.name): shapes[t.name] for t in source.graph.inputs if t.name in shapes and t.shape != shapes[t.name]}
    if not moved:
        return source
    graph = source.graph.copy()
    for tensor in graph.inputs:
        tensor.shape = moved.get(tensor.name, tensor.shape)
    graph.infer_shapes(outputs=True)
    fit = [i for i, feed in enumerate(source.feeds) if all(list(v.shape) == shapes[n] for n, v in feed.items())]
    texts = {name: "x".join(map(str, shape)) for name, shape in moved.items()}
    notes = [f"the input {n!r} is fixed to {text}: the target compiles for one shape" for n, text in texts.items()]
    return replace(
        source,
        graph=graph,
        feeds=tuple(source.feeds[i] for i in fit),
        reference=tuple(source.reference[i] for i in fit if source.reference),
        notes=(*source.notes, *notes),
    )


class _Slower(Exception):
    """An engine of lower precision is not faster.

    Attributes:
        why: in one sentence.
        precision: of that engine.
        report: its report, as JSON.
    """

    def __init__(self, why: str, precision: str, report: bytes):
        super().__init__(why)
        self.why, self.precision, self.report = why, precision, report


def _build(
    source: Source,
    out: Path,
    options: Options,
    say: Callable[[str], None],
    target: Target,
    instead_of: _Slower | None = None,
) -> Bundle:
    target.check(options.target_options)
    spec = pipeline_spec(options)
    pipeline = _pipeline(options)
    if _keeps_score(pipeline) and (source.file is None or "evaluate" not in source.file.defines):
        raise _no_score(source.name)
    done = ",".join(filter(None, (options.before, str(pipeline))))
    clock = _Clock()
    graph = source.graph.copy()
    stages: list[tuple[Step, Graph]] = []
    with new_folder(out) as folder, tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
        data = _calibration(source, pipeline, options, Path(scratch) / "calibration", say)
        timer = None
        if (
            any(p.name == "prune" for p in pipeline.passes)
            and target.missing() is None
            and not (options.prepare or options.device)
        ):
            timer = _Timer(target, source, options, Path(scratch) / "timed", say)
        with clock("passes"), _scorer(source, pipeline, Path(scratch) / "score", say) as scorer:
            try:
                trace = pipeline.run(
                    graph,
                    source.feeds,
                    strict=options.strict,
                    progress=say,
                    on_step=lambda step, after: stages.append((step, after.copy())) if step.rewrites else None,
                    calibration=data,
                    evaluate=scorer,
                    cache=calibration.cache_folder(),
                    measure=timer,
                )
            finally:
                if scorer is not None and scorer.failure is not None:
                    raise scorer.failure
        if options.prune is not None or options.prune_params is not None:
            for step in filter(_prunes, trace.failures):
                raise InputError("the model cannot be pruned so", step.failure)
        files = [f.name for f in graph.save(folder / bundle.MODEL)]
        tolerance = TOLERANCE[options.precision]
        if unchanged := _without_int8(graph, trace, options):
            say(unchanged)
            options = replace(options, precision="fp32")
        if options.prepare or target.missing() is not None:
            say(f"preparing for {options.target}")
            prepared = target.prepare(graph, options.target_options)
            reference, _ = _reference(source, graph, trace, options, stages)
            bundle.write_probe(folder, source.feeds[0], reference[0])
            manifest = bundle.write_manifest(
                folder,
                prepared.manifest,
                state=bundle.PREPARED,
                missing=prepared.line(out),
                problems={version: [str(p) for p in found] for version, found in prepared.problems.items()},
                name=source.name,
                precision=options.precision,
                passes=done,
                digest=graph.digest(),
                versions={"edgecompile": __version__, **source.versions},
            )
            return Bundle(out, manifest)
        say(f"building the {options.target} engine")
        with clock("build"):
            engine = target.build(graph, folder, options.target_options, say)
        say("checking parity")
        with clock("parity"):
            reference, left_by = _reference(source, graph, trace, options, stages)
            errors, elsewhere = {}, ""
            try:
                errors = oracle.worst(
                    oracle.compare_all(r, engine.run(f)) for f, r in zip(source.feeds, reference, strict=True)
                )
            except EnvironmentMissing as error:  # compiled for another machine
                elsewhere = f"the engine was neither compared nor measured: {error.what}"
                options = replace(options, bench=False)
        approximated = target.approximates(graph, options.target_options)
        if all(e.max_rel <= tolerance for e in errors.values()):
            approximated = ""  # it may, but did not
        if approximated:
            tolerance = max(tolerance, TOLERANCE["int8"])
        budget = None if not approximated else APPROXIMATE if options.min_snr is None else options.min_snr
        _require_parity(errors, tolerance, source)
        if budget is not None:
            _require_budget(errors, budget, approximated, source)
        bundle.write_probe(folder, source.feeds[0], reference[0])
        accuracy = None
        if options.bench and not options.device and source.file and "evaluate" in source.file.defines:
            say("evaluating")
            with clock("evaluate"):
                accuracy = frontend.evaluate(
                    source.file, folder, engine.manifest, folder=Path(scratch) / "evaluate", progress=say
                )
        latency, layers, saved = [], [], {}
        if options.bench:
            with clock("measure"):
                arms = _arms(target, source, stages, options, Path(scratch), say)
                arms["engine"] = (graph, folder, engine.manifest)
                latency = _measure(target, engine, arms, source, options, say)
                say("profiling layers")
                layers = engine.layers(source.feeds[0])
                saved = _saved(target, arms, stages, trace, layers, source.feeds[0])
        warnings = [f"{instead_of.why}; this is fp32 (--force keeps {instead_of.precision})"] if instead_of else []
        warnings += [text for text in (unchanged, elsewhere, *target.notes) if text]
        if data is not None and data.random:
            warnings.append("the ranges come from random numbers, which say nothing about the accuracy on real data")
        slower = _slower(dict(latency), stages, layers, options)
        # What a pass asked for by name has made is kept: it may be wanted for its bytes.
        kept = options.force or options.precision == "fp32"
        if slower and kept:
            warnings.insert(0, slower)
        made = report.Report.from_build(
            source=source,
            options=options,
            spec=spec,
            command=shlex.join(["edgecompile", *sys.argv[1:]]),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            trace=trace,
            before=stats.count(source.graph, source.feeds[0]),
            after=stats.count(graph, source.feeds[0]),
            parity=errors,
            left_by=left_by,
            tolerance=tolerance,
            approximated=approximated,
            min_snr=budget,
            latency=latency,
            accuracy=accuracy,
            layers=layers,
            saved=saved,
            engine=engine.manifest,
            machine=target.machine(),
            seconds=clock.seconds,
            files=[folder / f for f in (*files, *engine.manifest.files)],
            warnings=warnings,
        )
        made.write(folder)
        engine.close()
        if slower and not kept:
            raise _Slower(slower, options.precision, (folder / "report.json").read_bytes())
        if instead_of:
            write_atomic(folder / f"rejected-{instead_of.precision}.json", [instead_of.report])
        manifest = bundle.write_manifest(
            folder,
            engine.manifest,
            name=source.name,
            precision=options.precision,
            passes=done,
            digest=graph.digest(),
            versions={"edgecompile": __version__, **source.versions, **engine.manifest.versions},
        )
    return Bundle(out, manifest)


def _with_budgets(pipeline: Pipeline, options: Options) -> Pipeline:
    """The passes that have a budget, with that of the options."""
    wanted = {"min_snr": options.min_snr, "max_drop": options.max_drop, "memory": options.calib_memory}
    passes: list[Any] = list(pipeline.passes)
    given = {name: value for name, value in wanted.items() if value is not None}
    return Pipeline(tuple(replace(p, **{k: v for k, v in given.items() if hasattr(p, k)}) for p in passes))


def _without_int8(graph: Graph, trace: Trace, options: Options) -> str:
    """What to say where int8 was asked for and no layer is; ``""`` elsewhere."""
    if options.precision != "int8" or qdq.is_quantized(graph):
        return ""
    tried = trace.sensitivity is not None and trace.sensitivity.table
    why = "no layer can be int8 and keep the budget" if tried else "no layer of the model can be int8"
    return f"{why}; this is fp32"


@contextlib.contextmanager
def _scorer(
    source: Source, pipeline: Pipeline, folder: Path, say: Callable[[str], None]
) -> Iterator[frontend.Scorer | None]:
    """What scores graphs, None if no pass keeps a score."""
    if source.file is None or not _keeps_score(pipeline):
        yield None
        return
    with frontend.scorer(source.file, folder=folder, cache=calibration.cache_folder(), progress=say) as scorer:
        yield scorer


def _calibration(
    source: Source, pipeline: Pipeline, options: Options, folder: Path, say: Callable[[str], None]
) -> CalibrationData | None:
    """The data that the passes take statistics from, None if none is given and none is needed."""
    if not any(p.name in _CALIBRATED for p in pipeline.passes):
        return None
    needed = any(_CALIBRATED.get(p.name) or getattr(p, "needs_data", False) for p in pipeline.passes)
    inputs = source.graph.signature().inputs
    given: str | Path | None = options.calib
    if given is None and source.file and "calibration_data" in source.file.defines:
        given = frontend.calibration_data(source.file, inputs, folder=folder, progress=say)
    if given is None and not needed:
        return None
    return calibration_data.open_data(given, inputs, options.preprocess, options.seed)


# Passes that use calibration data -> whether they need it.
_CALIBRATED = {"cast": False, "quantize": True, "shift_add": False, "prune": False}


def _before(arms: Mapping[str, Any], stages: Sequence[tuple[Step, Graph]]) -> str | None:
    """The arm whose precision was lowered: what the passes before the first inexact one left; pruning lowers none."""
    inexact = next((i for i, (step, _) in enumerate(stages) if not step.exact and not _prunes(step)), None)
    return None if inexact is None or not arms else list(arms)[inexact]  # the plain export comes first


def _saved(
    target: Target,
    arms: Mapping[str, _Arm],
    stages: Sequence[tuple[Step, Graph]],
    trace: Trace,
    layers: Sequence[LayerTime],
    feeds: Outputs,
) -> dict[int, float]:
    """Microseconds that int8 saves in the kernels that hold a layer, by the layer's position in the table's graph.

    A layer has none where a kernel holds several layers, or none could be named.
    """
    before = _before(arms, stages)
    if trace.sensitivity is None or before is None:
        return {}
    graph, place, manifest = arms[before]
    engine = target.load(place, manifest, graph)
    was = engine.layers(feeds)
    engine.close()
    named = {row.name: row for row in trace.sensitivity.table}

    def spent(found: Sequence[LayerTime]) -> dict[str, float]:
        times: dict[str, float] = {}
        shared: set[str] = set()
        for layer in found:
            held = named.keys() & layer.nodes
            shared |= held if len(held) > 1 else set()
            for name in held:
                times[name] = times.get(name, 0.0) + layer.microseconds
        return {name: time for name, time in times.items() if name not in shared}

    old, new = spent(was), spent(layers)
    return {named[n].position: old[n] - new[n] for n in old.keys() & new.keys() if not named[n].reverted}


def _slower(
    arms: Mapping[str, measure.Samples],
    stages: Sequence[tuple[Step, Graph]],
    layers: Sequence[LayerTime],
    options: Options,
) -> str:
    """Why an engine of lower precision is not worth having, ``""`` if it is or nothing was measured."""
    before = _before(arms, stages)
    if before is None:
        return ""
    found = measure.ratio(arms["engine"], arms[before])
    if found.value < 1:
        return ""
    between = [x for x in layers if x.op in ("QuantizeLinear", "DequantizeLinear", "Cast")]
    costly = sorted(report.by_module(layers), key=lambda m: -m.microseconds)[:3]
    parts = [
        f"{_lowered_by(stages) if options.precision == 'fp32' else options.precision} is not faster than fp32 here: "
        f"{found.value:.2f} of its time "
        f"({found.low:.2f} to {found.high:.2f})",
        f"{len(between)} conversions between types run as kernels of their own, "
        f"{sum(x.microseconds for x in between):.0f} us" if between else "",
        "most time goes into " + ", ".join(f"{m.path} ({m.microseconds:.0f} us)" for m in costly) if costly else "",
    ]  # fmt: skip
    return "; ".join(filter(None, parts))


def _lowered_by(stages: Sequence[tuple[Step, Graph]]) -> str:
    """The first pass that makes something less precise than the graph before it."""
    return next(step.spec for step, _ in stages if not step.exact and not _prunes(step))


def _prunes(step: Step) -> bool:
    return step.spec.startswith("prune")


def _approximated(trace: Trace, options: Options) -> bool:
    """Whether a pass changed more than the rounding that the tolerance of fp32 is for."""
    return options.precision == "fp32" and any(step.rewrites and not step.exact for step in trace.steps)


def _reference(
    source: Source, graph: Graph, trace: Trace, options: Options, stages: Sequence[tuple[Step, Graph]]
) -> tuple[tuple[Outputs, ...], str]:
    """What an engine must compute: what the source does. Beside it the passes that left something else, if any.

    In fp32 a pass that promises no more than an approximation was judged by its own budget when it ran; then it is what
    the passes left, since the tolerance of fp32 is for rounding. Below fp32 it is what pruning left, if there was any.
    """
    left, by = None, ""
    if _approximated(trace, options):
        left, by = graph, ", ".join(step.spec for step in trace.steps if step.rewrites and not step.exact)
    elif pruned := next(((step, after) for step, after in reversed(stages) if _prunes(step)), None):
        left, by = pruned[1], pruned[0].spec
    if left is not None:
        return tuple(oracle.run(left, feeds) for feeds in source.feeds), by
    return source.reference or tuple(oracle.run(source.graph, feeds) for feeds in source.feeds), ""


def _require_parity(errors: Mapping[str, OutputError], tolerance: float, source: Source) -> None:
    for name, error in errors.items():
        if not error.max_rel <= tolerance:
            raise ParityError(
                f"the engine of {source.name} is not the same model",
                f"output {name!r} differs by {error.max_rel:.1e} of its largest value, {tolerance:.0e} is allowed",
                "find the rewrite at fault with `edgecompile bisect`, or leave a pass out with --passes",
            )


def _require_budget(errors: Mapping[str, OutputError], budget: float, option: str, source: Source) -> None:
    for name, error in errors.items():
        if not error.snr_db >= budget:
            raise ParityError(
                f"the engine of {source.name} with {option} is not the same model",
                f"output {name!r} has a signal-to-noise ratio of {error.snr_db:.1f} dB, not {budget:g} dB",
                f"leave out --option {option}, or allow more with --min-snr",
            )


_Arm = tuple[Graph, Path, EngineManifest]


def _arms(
    target: Target,
    source: Source,
    stages: Sequence[tuple[Step, Graph]],
    options: Options,
    scratch: Path,
    say: Callable[[str], None],
) -> dict[str, _Arm]:
    """Engines to compare with: the plain export first, then what each pass but the last left."""
    arms = {"plain export": _arm(target, source.graph, options, scratch / "plain", say)}
    tuned = bool(options.target_options.get("tune"))  # then the last graph without it shows what tuning is worth
    for number, (step, graph) in enumerate(stages if tuned else stages[:-1]):
        label = step.spec if step.spec not in arms else f"{step.spec} (pass {number + 1})"
        arms[label] = _arm(target, graph, options, scratch / str(number), say)
    return arms


def _arm(target: Target, graph: Graph, options: Options, folder: Path, say: Callable[[str], None]) -> _Arm:
    """An engine of a graph, which is legalized where the target cannot take it as it is."""
    try:
        return graph, *_lowered(target, graph, options, folder, say)
    except InputError as error:
        needed = next((p for p in Pipeline.parse(target.pipelines["fp32"]).passes if p.name == "legalize"), None)
        if needed is None:
            raise
        say(f"{error.what}: legalized to compare with")
        legal = graph.copy()
        Pipeline.parse(f"clean,{needed},clean").run(legal, verify=False)
        shutil.rmtree(folder)
        return legal, *_lowered(target, legal, options, folder, say)


def _measure(
    target: Target,
    engine: Engine,
    arms: Mapping[str, _Arm],
    source: Source,
    options: Options,
    say: Callable[[str], None],
) -> list[tuple[str, measure.Samples]]:
    """Time all arms, interleaved; on a board, where there is one, whose clock only the target can read."""
    feeds: Outputs = source.feeds[0]
    if isinstance(target, BoardTarget):
        seconds = options.seconds / len(arms)
        taken = target.measured(arms, feeds, seconds, options.seed, lambda done: say(f"measuring, {done:.0%}"))
        return list(taken.items())
    order = random.Random(options.seed)

    @contextlib.contextmanager
    def open_arms() -> Iterator[dict[str, Callable[[], object]]]:
        opened: dict[str, Engine] = {}
        for label in order.sample(list(arms), len(arms)):
            graph, place, manifest = arms[label]
            opened[label] = target.load(place, manifest, graph)
        yield {label: opened[label].call(feeds) for label in arms}
        for arm in opened.values():
            arm.close()

    samples = measure.interleave_sessions(
        open_arms,
        engine.clock if engine.clock in measure.CLOCKS else "wall",
        seconds=options.seconds / len(arms),
        threads=engine.threads,
        seed=options.seed,
        progress=lambda done: say(f"measuring latency, {done:.0%}"),
    )
    return list(samples.items())


class _Timer:
    """Times graphs on the target, see :class:`edgecompile.pipeline.Measure`."""

    def __init__(self, target: Target, source: Source, options: Options, folder: Path, say: Callable[[str], None]):
        self._target, self._source, self._options, self._folder, self._say = target, source, options, folder, say
        self._built = 0

    @property
    def facts(self) -> Mapping[str, str]:
        """Target, options, versions, device and CPU."""
        return self._facts

    @functools.cached_property
    def _facts(self) -> dict[str, str]:
        engine, _ = self._build(self._source.graph)
        manifest, threads = engine.manifest, engine.threads
        engine.close()
        known = measure.machine()
        return {
            "target": manifest.target,
            "options": repr(sorted(manifest.options.items())),
            "versions": repr(sorted(manifest.versions.items())),
            "device": manifest.device,
            "cpu": f"{known['cpu']} {known['features']}",
            "clock": f"{engine.clock}, {threads} threads",
        }

    def _build(self, graph: Graph) -> tuple[Engine, Path]:
        place = self._folder / str(self._built)
        place.mkdir(parents=True)
        self._built += 1
        return self._target.build(graph, place, _untuned(self._options)), place

    def __call__(self, graphs: Sequence[Graph], seconds: float, sessions: int) -> list[measure.Samples]:
        """See :class:`edgecompile.pipeline.Measure`; inputs that the model does not have are random."""
        arms: list[tuple[Graph, Path, EngineManifest, Outputs]] = []
        clock, threads = "wall", 0
        for graph in graphs:
            engine, place = self._build(graph)
            clock, threads = engine.clock if engine.clock in measure.CLOCKS else "wall", engine.threads
            known = self._source.feeds[0]
            feeds = {n: known.get(n, v) for n, v in oracle.random_feeds(graph.signature().inputs).items()}
            arms.append((graph, place, engine.manifest, feeds))
            engine.close()
        order = random.Random(self._options.seed)

        @contextlib.contextmanager
        def open_arms() -> Iterator[dict[str, Callable[[], object]]]:
            opened: dict[int, Engine] = {}
            for i in order.sample(range(len(arms)), len(arms)):
                graph, place, manifest, _ = arms[i]
                opened[i] = self._target.load(place, manifest, graph)
            yield {str(i): opened[i].call(arms[i][3]) for i in range(len(arms))}
            for engine in opened.values():
                engine.close()

        samples = measure.interleave_sessions(
            open_arms, clock, sessions=sessions, seconds=seconds, threads=threads, seed=self._options.seed
        )
        for _, place, _, _ in arms:
            shutil.rmtree(place)
        return list(samples.values())


def _untuned(options: Options) -> dict[str, Any]:
    """Options of the target without a search for faster kernels, which only the engine that is kept is worth."""
    return {name: value for name, value in options.target_options.items() if name != "tune"}


def _lowered(
    target: Target, graph: Graph, options: Options, folder: Path, say: Callable[[str], None]
) -> tuple[Path, EngineManifest]:
    """Lower a graph that is only to be compared with."""
    say("building an engine to compare with")
    folder.mkdir()
    engine = target.build(graph, folder, _untuned(options), say)
    graph.save(folder / bundle.MODEL)
    engine.close()
    return folder, engine.manifest


class _Clock:
    """Wall time per phase of the build, in seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start
