"""Looking for kernels that are faster here than those the cost models choose.

What is searched is small and our own: the tile of a kernel, Winograd or not and how large, how far the reduction is
unrolled, which loop is outside (:class:`edgecompile.targets.tvm.schedules.tile.Choice`). Each kernel begins with the
choice of the cost models and goes from the best one known to whatever differs from it in one respect, until nothing
does better: some twenty trials. MetaSchedule's own search mutates hundreds of random programs per kernel because its
space is that of all programs; it also starts from a lowered function, while a tile decides how weights are packed,
before there is one. So the search is ours, and what MetaSchedule brings is its database: a workload is the function as
the cost models make it, the trace of a record holds one decision per field of the choice, and whatever was measured
before is not measured again, however the last search ended.

Kernels are timed in the model, by its profiler. A kernel on its own finds its weights and its code in the caches and
has nothing fused into it: choices that gained 10 % so made the model 6 % slower. A round compiles the model with one
trial for every kernel that is worth one, and alternates with the untuned model, in this process, so that both see the
same machine: the kernels are searched side by side, and nothing is compiled that is not a model's.

In the end the best choices are measured again, since the best of many is lucky, and what does not hold is dropped.
Then the whole model takes turns with itself untuned, and only if it is faster for certain is it kept.

A build without tuning knows nothing of records, so that it gives the same library wherever it runs. A bundle whose
engine was tuned holds the records that made it; named by the option ``tuning``, they make it again without measuring.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile import calibration, measure, oracle
from edgecompile.errors import EdgecompileError, InputError
from edgecompile.files import cannot_write, write_atomic
from edgecompile.graph import Graph
from edgecompile.measure import Ratio
from edgecompile.target import Engine
from edgecompile.targets.tvm import lower, schedules
from edgecompile.targets.tvm.options import Options
from edgecompile.targets.tvm.schedules import Kernel
from edgecompile.targets.tvm.schedules.tile import Choice

FACTS, WORKLOADS, RECORDS = FILES = ("tuning.json", "tuning_workloads.json", "tuning_records.json")
SCHEMA = "edgecompile.tuning/1"
# What a choice may be, what is tried first first; a record holds positions in these.
SPACE: Mapping[str, Sequence[Any]] = {
    "size": (None, 0, 2, 4),
    "rows_outside": (False, True),
    "steps": (4, 8, 2, 16, 1),
    "rank": tuple(range(12)),
}
_FAILED = 1e10  # seconds that MetaSchedule records for what cannot be built
_GAIN, _GAIN_AGAIN = 0.97, 0.99  # of the time a kernel takes: what is worth having, and what it must keep
_SHARE = 0.002  # of the model's time, below which a kernel is not worth a trial
_LOADS = 2  # of a library for a trial
_BUILDS = 4  # that the end of a tuning may take, of which as much time is left
_SESSIONS, _COMPARED_SECONDS = 10, 8.0  # of the tuned and the untuned model


# -- records -----------------------------------------------------------------------------------------------------------


class Records:
    """MetaSchedule's database in a folder: what each choice for each kernel took on one kind of machine.

    Args:
        folder: made where it does not exist, unless it is only read.
        chosen: the options that kernels are compiled with.
        write: whether records will be added.

    Raises:
        InputError: the folder holds no database that can be read, or none that fits and is to be read only.
    """

    def __init__(self, folder: Path, chosen: Options, *, write: bool = True):
        import tvm
        from tvm.s_tir.meta_schedule.database import JSONDatabase

        self._target = tvm.target.Target({**chosen.target, "num-cores": chosen.threads})
        self._known: dict[int, dict[Choice, float]] = {}
        if write:
            _prepare(folder, facts(chosen))
        else:
            _require(folder, facts(chosen))
        try:
            self._database = JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS), allow_missing=write)
            for record in self._database.get_all_tuning_records():
                if str(record.target) == str(self._target):
                    choice, seconds = _decided(record.trace), min(map(float, record.run_secs))
                    self._known.setdefault(_hash(record.workload.mod), {})[choice] = seconds
        except Exception as error:  # TVM raises types of many kinds
            raise InputError(
                f"{folder} holds no tuning records that can be read",
                " ".join(str(error).split())[:200],
                f"remove {folder / WORKLOADS} and {folder / RECORDS}" if write else "name another folder",
            ) from None

    def of(self, kernel: Kernel) -> dict[Choice, float]:
        """Seconds by choice."""
        return dict(self._known.get(_hash(_alone(kernel.function)), {}))

    def add(self, kernel: Kernel, choice: Choice, seconds: float) -> None:
        """Remember a measurement, on disk too."""
        from tvm.s_tir import Schedule
        from tvm.s_tir.meta_schedule.database import TuningRecord

        module = _alone(kernel.function)
        self._known.setdefault(_hash(module), {})[choice] = seconds
        plan: Any = Schedule(module)
        for name, values in SPACE.items():
            count = len(values)
            plan.sample_categorical(list(range(count)), [1 / count] * count, values.index(getattr(choice, name)))
        workload: Any = self._database.commit_workload(module)
        self._database.commit_tuning_record(TuningRecord(plan.trace, workload, [seconds], self._target, None))


def facts(chosen: Options) -> dict[str, Any]:
    """What records hold for: TVM, the target, threads, and the schedules, whose source says what a rank means."""
    digest = hashlib.sha256()
    for path in sorted(Path(schedules.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {
        "schema": SCHEMA,
        "tvm": version("apache-tvm"),
        "target": dict(chosen.target),
        "threads": chosen.threads,
        "schedules": digest.hexdigest()[:16],
    }


def cache_folder(chosen: Options) -> Path:
    """Where the records for these options are kept."""
    key = hashlib.sha256(json.dumps(facts(chosen), sort_keys=True).encode()).hexdigest()[:16]
    return calibration.cache_folder().parent / "tuning" / f"tvm-{key}"


def _prepare(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Make a folder for records; the line that a killed process left unfinished is dropped."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / WORKLOADS, folder / RECORDS):
            content = path.read_bytes() if path.exists() else b""
            if content and not content.endswith(b"\n"):
                write_atomic(path, [content[: content.rfind(b"\n") + 1]])
    except OSError as error:
        raise cannot_write(folder, error) from None
    write_atomic(folder / FACTS, [json.dumps(wanted, indent=1).encode()])


def _require(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse records that hold for something else.

    Raises:
        InputError: they do, or there are none.
    """
    try:
        found = json.loads((folder / FACTS).read_text())
        differing = [name for name, value in wanted.items() if found.get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} holds no tuning records", str(error), "name a bundle that was tuned") from None
    if differing:
        raise InputError(
            f"the tuning records of {folder} are not for this build",
            "; ".join(f"{name} is {wanted[name]}, theirs {found.get(name)}" for name in differing),
            "tune again: --tune 10m",
        )


def _alone(function: Any) -> Any:
    import tvm

    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def _hash(module: Any) -> int:
    import tvm_ffi

    return tvm_ffi.structural_hash(module)


def _decided(trace: Any) -> Choice:
    positions = (int(trace.decisions[instruction]) for instruction in trace.insts)
    return Choice(**{n: values[i] for (n, values), i in zip(SPACE.items(), positions, strict=True)})


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Task:
    """A kernel to find a choice for.

    Attributes:
        kernel: the first of those that are equal.
        count: how often the model runs it.
        known: seconds by choice, of one run in the model.
    """

    kernel: Kernel
    count: int = 0
    known: dict[Choice, float] = field(default_factory=dict)

    @property
    def untuned(self) -> float:
        """Seconds of the model that this kernel takes without tuning."""
        return self.count * self.known.get(Choice(), 0.0)

    @property
    def best(self) -> Choice:
        """The fastest choice, or that of the cost models unless another is faster by more than noise."""
        plain = Choice()
        found = min(self.known, key=self.known.__getitem__, default=plain)
        return found if self.known.get(found, math.inf) < _GAIN * self.known.get(plain, 0.0) else plain

    @property
    def tuned(self) -> float:
        """Seconds of the model that this kernel takes with the best choice."""
        return self.count * self.known.get(self.best, 0.0)

    def next(self) -> Choice | None:
        """What to try: whatever differs in one respect from the fastest, None where all of that is known."""
        best = min(self.known, key=self.known.__getitem__, default=Choice())
        sizes = self.kernel.call.op.name == "relax.nn.conv2d"
        near = (
            replace(best, **{name: value})
            for name, values in SPACE.items()
            if sizes or name != "size"
            for value in values
        )
        return next((choice for choice in near if choice not in self.known), None)


class Tasks:
    """The distinct kernels of a model, by their origin."""

    def __init__(self, records: Records):
        self.records = records
        self._tasks: dict[int, Task] = {}

    @property
    def all(self) -> list[Task]:
        """In the order in which the model first runs them."""
        return list(self._tasks.values())

    def add(self, kernel: Kernel) -> None:
        """Count a kernel."""
        if kernel.origin not in self._tasks:
            self._tasks[kernel.origin] = Task(kernel, known=self.records.of(kernel))
        self._tasks[kernel.origin].count += 1

    def best(self, kernel: Kernel) -> Choice:
        """The choice for a kernel that was counted before."""
        return self._tasks[kernel.origin].best

    def trying(self, trials: Mapping[int, Choice]) -> schedules.Pick:
        """Picks what is to be tried, and the best choice for kernels of which nothing is."""
        return lambda kernel: trials[kernel.origin] if kernel.origin in trials else self.best(kernel)

    def learn(self, origin: int, choice: Choice, seconds: float) -> None:
        """Add what was measured."""
        task = self._tasks[origin]
        task.known[choice] = seconds
        self.records.add(task.kernel, choice, seconds)

    def drop(self, origins: Collection[int]) -> None:
        """Forget, but not on disk, what was found for some kernels."""
        for origin in origins:
            task = self._tasks[origin]
            task.known = {Choice(): task.known[Choice()]}


@dataclass(frozen=True)
class Build:
    """A library and what it holds.

    Attributes:
        path: the library.
        kernels: as :func:`edgecompile.targets.tvm.lower.build` returns them.
    """

    path: Path
    kernels: Sequence[Mapping[str, Any]]


Runner = Callable[[Build], Sequence[float]]
"""Loads a library, runs the model some times, and returns the seconds of each kernel in the order of execution."""


def here(opened: Callable[[Build], Engine], feeds: Mapping[str, np.ndarray]) -> Runner:
    """The runner of this process."""

    def run(build: Build) -> Sequence[float]:
        engine = opened(build)
        seconds = [layer.microseconds / 1e6 for layer in engine.layers(feeds)]
        engine.close()
        return seconds

    return run


def spent(builds: Sequence[Build], runner: Runner, loads: int) -> list[dict[int, float]]:
    """Seconds by origin that the kernels of each library take in one run of the model.

    Args:
        builds: the libraries, which take turns.
        runner: runs them.
        loads: how often each is loaded: where memory happens to lie makes a difference of several percent. What counts
            is the fastest.
    """
    taken: list[list[Sequence[float]]] = [[] for _ in builds]
    for _ in range(loads):
        for runs, build in zip(taken, builds, strict=True):
            runs.append(runner(build))
    found: list[dict[int, float]] = []
    for runs, build in zip(taken, builds, strict=True):
        of: dict[int, float] = {}
        for kernel, seconds in zip(build.kernels, np.min(runs, axis=0), strict=True):
            if "origin" in kernel:
                of[kernel["origin"]] = of.get(kernel["origin"], 0.0) + float(seconds)
        found.append(of)
    return found


def search(
    tasks: Tasks,
    plain: Build,
    compiled: Callable[[schedules.Pick], Build],
    runner: Runner,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Measure choices until the time is up or none is left; what was measured is recorded at once.

    Args:
        tasks: the kernels; what is known of them grows.
        plain: the model without any choice.
        compiled: makes another library of the same model.
        runner: runs both.
        seconds: to spend; the round that is under way when they are over is finished.
        say: told how far it is.
    """
    begun = time.perf_counter()
    if any(not task.known for task in tasks.all) and seconds > 0:
        say("tuning: timing the kernels as they are")
        (times,) = spent([plain], runner, _LOADS)
        for task in tasks.all:
            if not task.known and task.kernel.origin in times:  # what no output needs is not run
                tasks.learn(task.kernel.origin, Choice(), times[task.kernel.origin] / task.count)
    untuned = sum(task.untuned for task in tasks.all)
    worth = [task for task in tasks.all if task.untuned >= _SHARE * untuned]
    for number in itertools.count(1):
        trials = {task.kernel.origin: choice for task in worth if (choice := task.next()) is not None}
        left = seconds - (time.perf_counter() - begun)
        done, best = len(tasks.all) - len(trials), sum(task.tuned for task in tasks.all)
        share = 100 * max(1 - left / seconds, done / len(tasks.all)) if trials and left > 0 else 100
        minutes, rest = divmod(max(int(left), 0), 60)
        say(
            f"tuning: round {number}, {done} of {len(tasks.all)} kernels done, {minutes}:{rest:02} left, "
            f"kernels take {best * 1e3:.3g} ms, {untuned * 1e3:.3g} ms untuned, {share:.0f}%"
        )
        if not trials or left <= 0:
            return
        try:
            tried = compiled(tasks.trying(trials))
            before, after = spent([plain, tried], runner, _LOADS)
            tried.path.unlink()
        except EdgecompileError:
            for origin in _unbuildable(tasks, trials):
                tasks.learn(origin, trials[origin], _FAILED)
            continue
        for task in worth:
            if (origin := task.kernel.origin) in trials:
                tasks.learn(origin, trials[origin], task.known[Choice()] * after[origin] / before[origin])


def _unbuildable(tasks: Tasks, trials: Mapping[int, Choice]) -> list[int]:
    """Which of some choices the schedules refuse; all where that is not why the model could not be built."""
    refused = []
    for task in tasks.all:
        if (choice := trials.get(task.kernel.origin)) is not None:
            try:
                schedules.apply(_alone(task.kernel.having(choice)), task.kernel.chosen)
            except Exception:  # TVM raises types of many kinds
                refused.append(task.kernel.origin)
    return refused or list(trials)


# -- a build -----------------------------------------------------------------------------------------------------------


def build(
    graph: Graph,
    chosen: Options,
    path: Path,
    opened: Callable[[Path, Sequence[Mapping]], Engine],
    say: Callable[[str], None] | None = None,
    runner: Runner | None = None,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Compile ``graph`` with the kernels that tuning finds, or has found.

    Args:
        graph, chosen, path, say: as for :func:`edgecompile.targets.tvm.lower.build`; ``chosen`` asks for tuning.
        opened: makes an engine of a library and its kernels.
        runner: runs libraries, by default in this process.

    Returns:
        the kernels as ``lower.build`` returns them, and the names of the further files written beside ``path``: the
        records that make this library again, none if the cost models' choice was best.

    Raises:
        InputError: as ``lower.build``; the records cannot be used; another search runs; or kernels compiled for another
            machine are to be timed.
    """
    tell = say or (lambda _: None)
    if chosen.tuning:
        tasks = Tasks(Records(Path(chosen.tuning), chosen, write=False))
        kernels = lower.build(graph, chosen, path, say, lambda kernel: tasks.add(kernel) or tasks.best(kernel))
        return _without_origin(kernels), _kept(tasks, chosen, path.parent, None)
    if not chosen.runs_here:
        raise InputError(
            "kernels for another machine cannot be timed here",
            f"they are compiled for {chosen.machine}",
            "tune on that machine, or name its records with --option tuning=FOLDER",
        )
    folder, feeds = cache_folder(chosen), oracle.random_feeds(graph.signature().inputs)
    with _alone_in(folder), tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
        tasks = Tasks(Records(folder, chosen))
        module = lower.folded(graph, chosen, say)
        run = runner or here(lambda build: opened(build.path, build.kernels), feeds)
        names = (Path(scratch) / f"{number}-{path.name}" for number in itertools.count())

        def compiled(pick: schedules.Pick) -> Build:
            place = next(names)  # the system knows a library by its name: another one needs another name
            return Build(place, lower.build(graph, chosen, place, None, pick, module))

        begun = time.perf_counter()
        kept = plain = compiled(lambda kernel: tasks.add(kernel) or Choice())
        asked, took = chosen.tune or 0.0, time.perf_counter() - begun
        search(tasks, plain, compiled, run, max(asked - _BUILDS * took, asked / 2), tell)
        files: tuple[str, ...] = ()
        if tuned := _confirmed(tasks, plain, compiled, run, tell):
            ratio = compare(feeds, *(opened(build.path, build.kernels) for build in (tuned, plain)))
            shown = f"tuning: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the untuned time"
            if ratio.high < 1:
                kept, files = tuned, _kept(tasks, chosen, path.parent, ratio)
            tell(shown if files else f"{shown} is not faster for certain, the untuned engine is kept")
        shutil.move(kept.path, path)
        return _without_origin(kept.kernels), files


def _confirmed(
    tasks: Tasks,
    plain: Build,
    compiled: Callable[[schedules.Pick], Build],
    runner: Runner,
    say: Callable[[str], None],
) -> Build | None:
    """The model with the best choices that are still faster when they are measured again; None if there are none."""
    picked = [task.kernel.origin for task in tasks.all if task.best != Choice()]
    if picked:
        say("measuring the best kernels again")
        tuned = compiled(tasks.best)
        before, after = spent([plain, tuned], runner, 2 * _LOADS)
        chance = [origin for origin in picked if after[origin] > _GAIN_AGAIN * before[origin]]
        if not chance:
            return tuned
        tasks.drop(chance)
        if len(chance) < len(picked):
            return compiled(tasks.best)
    say("tuning found no kernel that is faster")
    return None


def _without_origin(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kernels as they are stored."""
    return [{name: value for name, value in kernel.items() if name != "origin"} for kernel in kernels]


def compare(feeds: Mapping[str, np.ndarray], tuned: Engine, untuned: Engine) -> Ratio:
    """Time of one engine as a part of the other's, by sessions in which they take turns."""
    arms = {"tuned": tuned, "untuned": untuned}

    @contextlib.contextmanager
    def open_arms() -> Iterator[dict[str, Callable[[], object]]]:
        yield {name: engine.call(feeds) for name, engine in arms.items()}
        for engine in arms.values():
            engine.close()

    taken = measure.interleave_sessions(
        open_arms, tuned.clock, sessions=_SESSIONS, seconds=_COMPARED_SECONDS, threads=max(tuned.threads, 1)
    )
    return measure.ratio(taken["tuned"], taken["untuned"])


def _kept(tasks: Tasks, chosen: Options, folder: Path, ratio: Ratio | None) -> tuple[str, ...]:
    """Write the records of what a model uses into the folder of its engine."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    records = Records(folder, chosen)
    for task in tasks.all:
        if (best := task.best) != Choice():
            for choice in (Choice(), best):
                records.add(task.kernel, choice, task.known[choice])
    rows = [
        {
            "kernel": task.kernel.call.op.name,
            "shape": [int(d) for d in task.kernel.call.ty.shape],
            "count": task.count,
            "untuned_us": task.untuned / task.count * 1e6,
            "tuned_us": task.tuned / task.count * 1e6,
            "choice": asdict(task.best),
        }
        for task in tasks.all
    ]
    found = {**facts(chosen), "kernels": rows, **({"ratio": ratio.as_dict()} if ratio else {})}
    write_atomic(folder / FACTS, [json.dumps(found, indent=1).encode()])
    return FILES


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other searches out of a folder: they would disturb the timing, too.

    Raises:
        InputError: another one is in it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError("another search for kernels is running", f"it holds {folder}", "wait for it") from None
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield
    finally:
        lock.release()
