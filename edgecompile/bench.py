"""``edgecompile bench``: how long one call of an engine takes, and what it costs beside time.

The engine is opened anew several times. Two sessions of the very same engine differ by a few percent, in memory layout
if nothing else, and no number of calls in one of them averages that out: the interval of the median therefore rests on
the medians of the sessions, and measuring goes on, session by session, until it is narrow enough or the time is up.
The other percentiles get the interval of the order statistics of all calls, widened to that of the sessions' own
percentiles where a session has enough calls to have one. Both assume nothing about the distribution (David and
Nagaraja, Order Statistics, section 7.1).

A call is timed with the engine's own clock and with the wall clock beside it. Of calls shorter than two milliseconds,
about one in two milliseconds is timed, so that reading the clocks does not slow down what they measure.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import __version__, board_runner, documents, history, measure, registry, roofline, sequential
from edgecompile.board_runner import Footprint
from edgecompile.bundle import MANIFEST, MODEL, Bundle, file_digest
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.measure import P99_SAMPLES, Samples
from edgecompile.roofline import LayerCost, LayerTable, ModuleCost, Roofline
from edgecompile.target import Engine, EngineManifest

if TYPE_CHECKING:
    from edgecompile.fingerprint import Fingerprint
    from edgecompile.remote import Place

SCHEMA = "edgecompile.bench/1"
SAMPLES = "samples.npz"  # in the bundle; written by bench, so its manifest does not know it
PERCENTILES = (10, 25, 50, 90, 99)
CONFIDENCE = 0.95
SESSIONS = 6  # the fewest whose medians give an interval of 95 %
MOST_SAMPLES = 2000  # per clock in the document
_SLICE = 0.25  # seconds of one session at most
_LEAST_CALLS = 2  # of a session
_BLOCK_NS = 15_000_000
_PROCESSES = 3  # for cold start and memory
_APART = 2e-3  # seconds from one timed call to the next, at least


@dataclass(frozen=True)
class Percentile:
    """A percentile of the calls' durations, in seconds.

    Attributes:
        q: which, in percent.
        value: None for the 99th of fewer than 459 calls, which cannot support it.
        low, high: its interval with 95 % confidence; an end that the calls cannot give is not finite.
    """

    q: int
    value: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Session:
    """One session: how many calls, and their median in seconds."""

    calls: int
    p50: float


@dataclass(frozen=True)
class Timing:
    """The calls on one clock; times in seconds.

    Attributes:
        clock: ``thread_cpu``, ``wall`` or ``cuda_event``.
        calls: how many were timed, in all sessions.
        mean, minimum: over these.
        overhead: what an empty call costs on this clock; it is contained in every figure.
        percentiles: p10, p25, p50, p90, p99.
        sessions: in order.
        samples: at most 2000 calls, evenly spaced in time.
    """

    clock: str
    calls: int
    mean: float
    minimum: float
    overhead: float
    percentiles: tuple[Percentile, ...]
    sessions: tuple[Session, ...]
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Samples) -> Timing:
        """Summarise the calls of one clock."""
        parts = [part.seconds for part in measure.by_session(samples)]
        calls = samples.seconds
        kept = np.unique(np.linspace(0, len(calls) - 1, MOST_SAMPLES).round().astype(int))
        return cls(
            samples.clock,
            len(calls),
            float(calls.mean()),
            float(calls.min()),
            samples.overhead,
            tuple(_percentile(calls, parts, q) for q in PERCENTILES),
            tuple(Session(len(p), float(np.median(p))) for p in parts),
            tuple(round(float(s), 9) for s in calls[kept]),
        )

    def percentile(self, q: int) -> Percentile:
        """One of the percentiles."""
        return next(p for p in self.percentiles if p.q == q)

    @property
    def p50(self) -> float:
        """The median in seconds."""
        return self.percentile(50).value or 0.0

    @property
    def precision(self) -> float:
        """Half the width of the median's interval, relative to it."""
        p50 = self.percentile(50)
        return (p50.high - p50.low) / 2 / p50.value if p50.value else float("inf")

    @property
    def spread(self) -> float:
        """How far the sessions' medians differ: largest over smallest, less 1."""
        medians = [s.p50 for s in self.sessions]
        return max(medians) / min(medians) - 1 if min(medians) > 0 else float("inf")


@dataclass(frozen=True)
class Memory:
    """Peak memory, measured in fresh processes; bytes of resident set, the median of three.

    Attributes:
        peak: how far the resident set grew, at most, from just before the runtime was imported until the engine was
            open and had run three times: the runtime's code, weights, activations.
        baseline: resident set before, i.e. Python, NumPy and the model file as edgecompile reads it.
    """

    peak: int
    baseline: int


@dataclass(frozen=True)
class ColdStart:
    """From a process without the runtime to the first result, in seconds; the median of three fresh processes.

    The files are in the page cache. Starting Python itself is not contained.

    Attributes:
        imports: importing the runtime.
        opening: opening the engine.
        first_call: the first run.
    """

    imports: float
    opening: float
    first_call: float

    @property
    def total(self) -> float:
        """All three."""
        return self.imports + self.opening + self.first_call


@dataclass(frozen=True)
class Phases:
    """Where the time of a call on a GPU goes, in seconds; medians of single calls, each waited for.

    Attributes:
        compute: on the GPU, between two CUDA events.
        enqueue: of the host, to launch it.
        end_to_end: from the first action of the host until the result is there.
        calls: how many there were.
        pinned: what the figures depend on and runtimes change between versions, e.g. ``cuda_graph``, ``transfers``.
    """

    compute: float
    enqueue: float
    end_to_end: float
    calls: int
    pinned: Mapping[str, Any]


@dataclass(frozen=True)
class BenchResult:
    """What one engine costs.

    Attributes:
        name: of the model.
        target, device: what the engine was made for.
        threads: CPU threads it uses, 0 if it does not run on the CPU.
        created: UTC time in ISO 8601.
        edgecompile: version.
        versions: of the runtime.
        machine: what is known about the machine.
        timings: the engine's own clock first, the wall clock beside it.
        load: one-minute load average before and after.
        seconds: wall time that measuring took, opening of sessions and warm-up included.
        wanted: precision of the median that was asked for.
        engine_bytes: size of the engine's files.
        memory, cold_start: None if they were not measured.
        phases: None for an engine that does not tell them apart.
        layers: None if they were not asked for.
        notes: what a reader should know.
    """

    name: str
    target: str
    device: str
    threads: int
    created: str
    edgecompile: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    timings: tuple[Timing, ...]
    load: tuple[float, ...]
    seconds: float
    wanted: float
    engine_bytes: int | None
    memory: Memory | None
    cold_start: ColdStart | None
    phases: Phases | None = None
    layers: LayerTable | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        engine: EngineManifest,
        samples: Mapping[str, Samples],
        *,
        seconds: float,
        wanted: float,
        machine: Mapping[str, Any] | None = None,
        engine_bytes: int | None = None,
        memory: Memory | None = None,
        cold_start: ColdStart | None = None,
        phases: Phases | None = None,
        notes: Sequence[str] = (),
    ) -> BenchResult:
        """Put together what is known of samples taken here or elsewhere.

        Args:
            name: of the model.
            engine: its manifest.
            samples: by clock, the engine's own first.
            seconds, wanted, engine_bytes, memory, cold_start, notes: see the attributes.
            machine: that the samples come from; this one if None.
        """
        first = next(iter(samples.values()))
        return cls(
            name=name,
            target=engine.target,
            device=engine.device,
            threads=first.threads,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            edgecompile=__version__,
            versions=dict(engine.versions),
            machine=dict(measure.machine() if machine is None else machine),
            timings=tuple(Timing.of(s) for s in samples.values()),
            load=tuple(first.load),
            seconds=seconds,
            wanted=wanted,
            engine_bytes=engine_bytes,
            memory=memory,
            cold_start=cold_start,
            phases=phases,
            notes=(*engine.options.get("_notes", ()), *notes),
        )

    @property
    def timing(self) -> Timing:
        """The calls on the engine's own clock."""
        return self.timings[0]

    @property
    def throughput(self) -> float:
        """Calls per second of wall time, one after the other."""
        wall = next((t for t in self.timings if t.clock == "wall"), self.timing)
        return 1 / wall.mean if wall.mean else 0.0

    @property
    def settled(self) -> bool:
        """Whether the median is as precise as was asked."""
        return self.timing.precision <= self.wanted

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON document."""
        return documents.encode(self, _DERIVED)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> BenchResult:
        """Read a document that :meth:`to_json` wrote.

        Raises:
            InputError: it is not a result of ``bench``, or one of another version.
        """
        found = document.get("schema") if isinstance(document, Mapping) else None
        if found != SCHEMA:
            raise InputError(f"this is not a result of the schema {SCHEMA}", f"its schema is {found!r}")
        try:
            return documents.decode(cls, document, "result", _DERIVED)
        except documents.Malformed as error:
            raise InputError("the result cannot be read", str(error)) from None


def schema() -> dict[str, Any]:
    """The JSON Schema of the document (draft 2020-12)."""
    return json.loads(resources.files("edgecompile").joinpath("schemas/bench.schema.json").read_text())


_DERIVED: documents.Derived = {
    BenchResult: {
        "schema": lambda _: SCHEMA,
        "throughput": lambda result: result.throughput,
        "settled": lambda result: result.settled,
    },
    Timing: {"precision": lambda timing: timing.precision, "spread": lambda timing: timing.spread},
    ColdStart: {"total": lambda start: start.total},
    Roofline: {"bandwidth_bytes_per_s": lambda found: found.bandwidth_bytes_per_s},
    LayerTable: {"seconds": lambda table: table.seconds, "gap": lambda table: table.gap},
    LayerCost: {
        name: lambda cost, name=name: getattr(cost, name)
        for name in ("bytes", "bound", "gap", "intensity", "efficiency", "limit")
    },
    ModuleCost: {name: lambda cost, name=name: getattr(cost, name) for name in ("intensity", "efficiency")},
}


def _percentile(calls: np.ndarray, sessions: Sequence[np.ndarray], q: int) -> Percentile:
    value = None if q == 99 and len(calls) < P99_SAMPLES else float(np.percentile(calls, q))
    low, high = sequential.percentile_interval(calls, q, CONFIDENCE)
    enough = min(map(len, sessions)) * min(q, 100 - q) >= 100 or q == 50
    if enough and len(sessions) >= SESSIONS:
        own = np.array([np.percentile(s, q) for s in sessions])
        ends = sequential.percentile_interval(own, 50, CONFIDENCE)
        low, high = min(low, ends[0]), max(high, ends[1])
    return Percentile(q, value, low, high)


# -- measuring ---------------------------------------------------------------------------------------------------------


def run(
    subject: Engine | Bundle,
    feeds: Mapping[str, np.ndarray],
    *,
    board: Place | None = None,
    seconds: float = 10.0,
    precision: float = 0.01,
    sessions: int = SESSIONS,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> BenchResult:
    """Measure an engine.

    Each session is opened anew, warmed up until the medians of two successive blocks agree, and timed for a quarter of
    a second at most. After ``sessions`` of them, measuring ends when the interval of the median is narrow enough or
    the time is up. The raw samples of a bundle are kept in it, as ``samples.npz``; its manifest stays as it is.

    Args:
        subject: a bundle; or an open engine, which gives one session only, and neither size, memory nor cold start.
        feeds: input arrays by name; a board takes those of the bundle.
        board: where, see :func:`edgecompile.remote.open_board`; None for this machine.
        seconds: wall time to spend; the least number of sessions is made in any case.
        precision: half the width of the median's 95 % interval that is enough, relative to the median.
        sessions: how many at least; six are the fewest whose medians give an interval.
        seed: of the blocks on a board.
        progress: called with the fraction of the time that has passed.

    Raises:
        ValueError: ``sessions`` is below 1, or ``seconds`` not above 0.
        InputError: an input is missing, unknown or of the wrong type or shape.
        EnvironmentMissing: the engine cannot be opened here, or its clock cannot be read.
    """
    if sessions < 1 or not seconds > 0:
        raise ValueError("at least one session and some time are needed")
    start = time.perf_counter()
    runs: list[dict[str, Samples]] = []
    notes = []
    key = ""
    if isinstance(subject, Bundle):
        name, manifest = str(subject.manifest.get("name", subject.path.name)), subject.engine_manifest
        least, share = sessions, min(_SLICE, seconds / sessions)
        key = board.add(subject.path) if board else ""
    else:
        name, manifest = "engine", subject.manifest
        least, share = 1, seconds
        notes.append("measured in one session: another one may differ by some percent")
    opened = None if board and board.device else _opener(subject)
    while True:
        if opened is None:
            runs.append(_session_there(board, key, name, share, seed + len(runs)))
        else:
            engine = opened()
            try:
                runs.append(_session(engine, feeds, name, share))
            finally:
                if engine is not subject:
                    engine.close()
        spent = (time.perf_counter() - start) / seconds
        if progress is not None:
            progress(min(1.0, spent, len(runs) / least))
        if len(runs) < least:
            continue
        samples = {clock: measure.joined([r[clock] for r in runs]) for clock in runs[0]}
        timing = Timing.of(next(iter(samples.values())))
        if spent >= 1 or timing.precision <= precision or not isinstance(subject, Bundle):
            break
    spent = time.perf_counter() - start
    memory = cold_start = size = parts = None
    if isinstance(subject, Bundle):
        path, size = subject.path, _engine_bytes(subject, manifest)
        try:
            memory, cold_start = footprint(lambda: board.footprint(key) if board else board_runner.footprint(path))
        except EdgecompileError as error:
            notes.append(f"memory and cold start could not be measured: {error}")
        if timing.clock not in measure.CLOCKS:
            parts = board.phases(key) if board else board_runner.phases(subject)
        try:
            keep(subject, samples, name=name)
        except InputError as error:
            notes.append(f"the raw samples are not kept: {error}")
    notes += board.notes if board else ()
    return BenchResult.of(
        name, manifest, samples, machine=board.facts().get("machine") if board and board.device else None,
        seconds=spent, wanted=precision, engine_bytes=size, memory=memory,
        cold_start=cold_start, phases=None if parts is None else Phases(**parts), notes=notes,
    )  # fmt: skip


def imported(bundle: Bundle, folder: Path) -> BenchResult:
    """The result of a run of ``trtexec`` on the bundle's ``model.onnx`` or engine, made elsewhere.

    Args:
        bundle: what was run; it may be a prepared one.
        folder: with ``times.json`` (--exportTimes) and, for layers, ``profile.json`` (--exportProfile) and
            ``layers.json`` (--exportLayerInfo).

    Raises:
        InputError: a file is missing, or is not what trtexec writes.
    """
    from edgecompile.graph import named
    from edgecompile.targets.trt import trtexec

    graph = named(bundle.graph())
    run = trtexec.load_folder(graph, folder)
    times = run.times
    assert times is not None
    calls, name = len(times.compute), str(bundle.manifest.get("name", bundle.path.name))
    samples = {
        clock: Samples(name, clock, seconds, 0, np.zeros(calls, np.int64))
        for clock, seconds in (("cuda_event", times.compute), ("wall", times.end_to_end))
    }
    compute, enqueue, end_to_end = (float(np.median(x)) for x in (times.compute, times.enqueue, times.end_to_end))
    result = BenchResult.of(
        name, bundle.engine_manifest, samples, machine={}, seconds=float(times.end_to_end.sum()), wanted=0.01,
        phases=Phases(compute, enqueue, end_to_end, calls, dict(times.pinned)),
        notes=("measured by trtexec, in one session: another one may differ by some percent",),
    )  # fmt: skip
    if not run.layers:
        return result
    return with_layers(result, roofline.layer_table(run.layers, graph, None, bundle.probe()[0]))


def keep(bundle: Bundle, samples: Mapping[str, Samples], **facts: Any) -> Path:
    """Write raw samples into a bundle, over those of an earlier run.

    Raises:
        InputError: the folder cannot be written, or a file of that name belongs to the bundle.
    """
    if SAMPLES in bundle.manifest["files"]:
        raise InputError(f"{bundle.path / SAMPLES} is part of the bundle", "its manifest gives its digest")
    measure.save(bundle.path / SAMPLES, samples, **facts)
    return bundle.path / SAMPLES


def layers(
    subject: Engine | Bundle,
    feeds: Mapping[str, np.ndarray],
    *,
    repeats: int = 10,
    graph: Any = None,
    board: Place | None = None,
) -> LayerTable:
    """Each layer's time, against the roofline of this machine where the engine runs on its CPU.

    Args:
        subject: a bundle, or an open engine with the ``graph`` that it was built from.
        feeds: input arrays by name; a board takes those of the bundle.
        repeats: profiled runs.
        graph: see ``subject``.
        board: where; None for this machine. A board's roofline is not known.

    Raises:
        EnvironmentMissing: the engine cannot be opened there, or the board sends no profile.
        InputError: the target does not tell the layers of an engine that ran on a board.
    """
    if board and board.device and isinstance(subject, Bundle):
        profile, source = board.profile(board.add(subject.path), repeats), subject.graph()
        target = registry.target(subject.manifest["target"])
        try:
            found = target.layers(subject.path, subject.engine_manifest, source, profile)
            if not all(0 <= layer.microseconds < math.inf for layer in found):
                raise ValueError("a time is negative or not finite")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EnvironmentMissing(f"{board.device} did not send a profile", f"{error!r:.200}") from None
        return roofline.layer_table(found, source, None, feeds)
    engine = subject.engine() if isinstance(subject, Bundle) else subject
    try:
        peaks = roofline.measured(engine.threads) if engine.threads else None
        source = subject.graph() if isinstance(subject, Bundle) else graph
        return roofline.layer_table(engine.layers(feeds, repeats), source, peaks, feeds)
    finally:
        if engine is not subject:
            engine.close()


def with_layers(result: BenchResult, table: LayerTable) -> BenchResult:
    """The same result with the layers."""
    return replace(result, layers=table)


def _opener(subject: Engine | Bundle) -> Callable[[], Engine]:
    """Opens a bundle's engine anew at every call, reading the model only once."""
    if not isinstance(subject, Bundle):
        return lambda: subject
    target, graph = registry.target(subject.manifest["target"]), subject.graph()
    return lambda: target.load(subject.path, subject.engine_manifest, graph)


def _engine_bytes(bundle: Bundle, manifest: EngineManifest) -> int:
    """Size of the engine's files; of the model where the runtime compiles it when it opens it."""
    return sum((bundle.path / name).stat().st_size for name in manifest.files or (MODEL,))


def _session(engine: Engine, feeds: Mapping[str, np.ndarray], name: str, seconds: float) -> dict[str, Samples]:
    """Warm up and time one session: samples by clock, the engine's own first."""
    call = engine.call(feeds)
    own = measure.CLOCKS.get(engine.clock)
    before = os.getloadavg()[0]
    with measure._no_garbage_collection():
        measure._warm_up(call, time.perf_counter_ns, _BLOCK_NS)
        # A clock that only the engine reads stands still for an empty call.
        overheads = [measure._overhead(own) if own else 0.0, measure._overhead(time.perf_counter_ns)]
        if own is not None:
            typical = float(_by_clock(call, own)(0.0)[0].min()) / 1e9
            taken = _by_clock(call, own, _every(typical))(seconds)
        else:
            taken = _by_timer(board_runner.timer(engine, feeds))(seconds)
    load = (before, os.getloadavg()[0])
    return {
        clock: Samples(
            name, clock, values / 1e9, engine.threads, np.zeros(len(values), np.int64),
            overhead, load,
        )
        for clock, values, overhead in zip((engine.clock, "wall"), taken, overheads, strict=True)
    }  # fmt: skip


def _session_there(board: Any, key: str, name: str, seconds: float, seed: int) -> dict[str, Samples]:
    """:func:`_session` on a board, where every call is timed."""
    samples = board.session({name: key}, seconds=seconds, seed=seed)[name]
    return {samples.clock: samples, "wall": measure.on_wall_clock(samples)}


_Taken = tuple[np.ndarray, np.ndarray]


def _by_clock(call: Callable[[], object], now: Callable[[], int], every: int = 1) -> Callable[..., _Taken]:
    wall = time.perf_counter_ns
    between = range(every - 1)

    def timed(seconds: float, least: int = _LEAST_CALLS) -> _Taken:
        taken, walls = [], []
        end = wall() + int(seconds * 1e9)
        while True:
            for _ in between:
                call()
            first = now()
            start = wall()
            call()
            stop = wall()
            taken.append(now() - first)
            walls.append(stop - start)
            if stop >= end and len(taken) >= least:
                return np.array(taken), np.array(walls)

    return timed


def _every(call: float) -> int:
    """Time every how many-th call of ``call`` seconds, so that the timed ones are two milliseconds apart.

    Reading the clocks takes a microsecond or two when the processor's caches hold the kernel's code for it. On a busy
    machine they do not after a call, and it takes ten.
    """
    return max(1, math.ceil(_APART / max(call, 1e-6)))


def _by_timer(once: Callable[[], float]) -> Callable[[float], _Taken]:
    wall = time.perf_counter_ns

    def timed(seconds: float) -> _Taken:
        taken, walls = [], []
        end = wall() + int(seconds * 1e9)
        while True:
            start = wall()
            taken.append(once() * 1e9)
            stop = wall()
            walls.append(stop - start)
            if stop >= end and len(taken) >= _LEAST_CALLS:
                return np.array(taken), np.array(walls)

    return timed


# -- memory and cold start ---------------------------------------------------------------------------------------------


def footprint(place: Callable[[], Footprint]) -> tuple[Memory, ColdStart]:
    """Peak memory and cold start, each the median of three fresh processes; ``place`` starts one.

    Raises:
        EdgecompileError: such a process fails.
    """
    found = [place() for _ in range(_PROCESSES)]
    middle = {key: statistics.median(getattr(f, key) for f in found) for key in vars(found[0])}
    memory = Memory(int(middle["peak"]), int(middle["baseline"]))
    return memory, ColdStart(middle["imports"], middle["opening"], middle["first_call"])


def remember(result: BenchResult, bundle: Bundle, fingerprint: Fingerprint, path: Path) -> None:
    """Append a line to a history.

    Raises:
        InputError: it cannot be written.
    """
    p50 = result.timing.percentile(50)
    values = {"latency_p50": result.timing.p50}
    if (p99 := result.timing.percentile(99).value) is not None:
        values["latency_p99"] = p99
    if result.memory is not None:
        values["peak_memory"] = float(result.memory.peak)
    if result.engine_bytes is not None:
        values["engine_size"] = float(result.engine_bytes)
    entry = history.Entry.now(
        "bench", result.name, result.target, str(bundle.manifest["precision"]), values,
        intervals={"latency_p50": (p50.low, p50.high)}, fingerprint=fingerprint.key,
        digest=file_digest(bundle.path / MANIFEST),
    )  # fmt: skip
    history.append(entry, path)
