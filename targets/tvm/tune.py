"""Looking for kernels that are faster than those the cost models choose, here or on boards.

What is searched is small and our own: the tile of a kernel, Winograd or not and how large, how far the reduction is
unrolled, which loop is outside (:class:`edgecompile.targets.tvm.schedules.tile.Choice`). Each kernel begins with the
choice of the cost models and goes from the best one known to whatever differs from it in one respect, until nothing
does better: some twenty trials. MetaSchedule's own search mutates hundreds of random programs per kernel because its
space is that of all programs; it also starts from a lowered function, while a tile decides how weights are packed,
before there is one. So the search is ours, and what MetaSchedule brings is its database: a workload is the function as
the cost models make it, the trace of a record holds one decision per field of the choice, and whatever was measured
before is not measured again, however the last search ended.

Kernels are timed in the model, which reads the clock between them. A kernel on its own finds its weights and its code
in the caches and has nothing fused into it: choices that gained 10 % so made the model 6 % slower. A round tries one
choice for each of a few kernels, those that take most for the trials they had. What it compiles are these kernels, with
what is fused into them; the plan of execution around them is made anew and calls all others where the untuned model has
them, on the same weights. The two alternate in one process, so that both see the same machine: a :class:`Runner` knows
which. Here, nothing is linked or written. On boards (:class:`edgecompile.targets.tvm.rpc.RpcRunner`) what was compiled
anew is uploaded, and with several boards several rounds are under way at once, each of which tries other choices.

The time that was asked for is that of everything but the last comparison: the import, the untuned model, the search,
and what the end of a search takes, which is kept for it.

In the end the best choices are measured again, since the best of many is lucky, and what does not hold is dropped.
Then the whole model takes turns with itself untuned, and only if it is faster for certain is it kept.

A build without tuning knows nothing of records, so that it gives the same library wherever it runs. A bundle whose
engine was tuned holds the records that made it; named by the option ``tuning``, they make it again without measuring.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgecompile import calibration, measure, oracle
from edgecompile.errors import EdgecompileError, EnvironmentMissing, InputError
from edgecompile.files import cannot_write, write_atomic
from edgecompile.graph import Graph
from edgecompile.measure import Ratio
from edgecompile.targets.tvm import lower, schedules
from edgecompile.targets.tvm.engine import TvmEngine
from edgecompile.targets.tvm.lower import Compiled
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
_TOGETHER = 12  # kernels that are tried in one round, at most
_BUILDS = 3  # that the end of a tuning may take, of which as much time is kept for it
_CONFIRMATIONS = 2  # of the best choices, that none is kept by luck
SESSIONS, COMPARED_SECONDS = 10, 8.0  # of the tuned and the untuned model


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


def cache_folder(chosen: Options, boards: str = "") -> Path:
    """Where the records for these options are kept.

    Args:
        chosen: the options.
        boards: kind of the boards that kernels are timed on; what a CPU has around it makes a difference, too.
    """
    key = hashlib.sha256(json.dumps([facts(chosen), boards], sort_keys=True).encode()).hexdigest()[:16]
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
        trying: choices that are being measured.
        again: what the best choice took when it was measured again, as a part of the untuned time.
    """

    kernel: Kernel
    count: int = 0
    known: dict[Choice, float] = field(default_factory=dict)
    trying: set[Choice] = field(default_factory=set)
    again: float | None = None

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
        return self.count * self.known.get(self.best, 0.0) if self.again is None else self.again * self.untuned

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
        return next((choice for choice in near if choice not in self.known and choice not in self.trying), None)


class Tasks:
    """The distinct kernels of a model, by their origin.

    Attributes:
        records: what is known of them, and where what is learnt is added.
        tried: how many choices were measured.
    """

    def __init__(self, records: Records):
        self.records = records
        self._tasks: dict[int, Task] = {}
        self.tried = 0

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

    def trials(self) -> dict[int, Choice]:
        """What to try next; nothing where all that is worth a trial is known."""
        least = _SHARE * sum(task.untuned for task in self.all)
        left = [(task, choice) for task in self.all if task.untuned > least and (choice := task.next()) is not None]
        left.sort(key=lambda pair: -pair[0].untuned / (len(pair[0].known) + len(pair[0].trying)))
        return {task.kernel.origin: choice for task, choice in left[:_TOGETHER]}

    def begin(self, trials: Mapping[int, Choice]) -> None:
        """Note what is being measured, so that it is not tried a second time meanwhile."""
        for origin, choice in trials.items():
            self._tasks[origin].trying.add(choice)

    def learn(self, origin: int, choice: Choice, seconds: float) -> None:
        """Add what was measured."""
        task = self._tasks[origin]
        task.known[choice] = seconds
        task.trying.discard(choice)
        self.tried += choice != Choice()
        self.records.add(task.kernel, choice, seconds)

    def confirm(self, origin: int, ratio: float) -> None:
        """Note what the best choice took when it was measured again; forget, but not on disk, what was only luck."""
        task = self._tasks[origin]
        if ratio <= _GAIN_AGAIN:
            task.again = ratio
        else:
            task.known, task.again = {Choice(): task.known[Choice()]}, None


Run = Callable[[Compiled], Sequence[tuple[str, float]]]
"""Opens a model, runs it some times, and returns the symbol and seconds of each kernel in the order of execution."""

Opened = Callable[[Path | Compiled, Sequence[Mapping[str, Any]]], TvmEngine]
"""Makes an engine of a library and its kernels."""

Exported = tuple[Path, Sequence[Mapping[str, Any]]]
"""A library and its kernels."""


class Runner(ABC):
    """What kernels are timed on.

    Attributes:
        boards: what they are called, ``""`` for this machine.
        at_once: how many times :meth:`submit` is worth calling before the first of them has an answer.
    """

    boards: str = ""
    at_once: int = 1

    @property
    def told(self) -> str:
        """How many boards there are, for people; ``""`` for this machine."""
        return ""

    @abstractmethod
    def submit(self, models: Sequence[Compiled], loads: int) -> Future[list[dict[int, float]]]:
        """What :func:`spent` returns; or EdgecompileError, which may be raised at once.

        It is EnvironmentMissing if there is nothing left to run on.
        """

    @abstractmethod
    def compare(self, tuned: Exported, untuned: Exported) -> Ratio:
        """Time of one library as a part of the other's, by sessions in which they take turns."""

    def close(self) -> None:  # noqa: B027 - this process holds nothing that is to be given back
        """Give back what it holds, whatever is under way."""


class Here(Runner):
    """This process.

    Args:
        graph: the model.
        chosen: the options.
        opened: makes engines.

    Raises:
        InputError: kernels compiled for another machine are to be timed.
    """

    def __init__(self, graph: Graph, chosen: Options, opened: Opened):
        if not chosen.runs_here:
            raise InputError(
                "kernels for another machine cannot be timed here",
                f"they are compiled for {chosen.machine}",
                "tune on such boards with --device, or on one of them, and name its records with --option "
                "tuning=FOLDER",
            )
        self._opened, self._feeds = opened, oracle.random_feeds(graph.signature().inputs)

    def run(self, made: Compiled) -> Sequence[tuple[str, float]]:
        """See :data:`Run`."""
        engine = self._opened(made, made.kernels)
        taken = timed(made.kernels, engine.profile(self._feeds))
        engine.close()
        return taken

    def submit(self, models: Sequence[Compiled], loads: int) -> Future[list[dict[int, float]]]:
        """See :class:`Runner`; it is done when this returns."""
        done: Future[list[dict[int, float]]] = Future()
        done.set_result(spent(models, self.run, loads))
        return done

    def compare(self, tuned: Exported, untuned: Exported) -> Ratio:
        """See :class:`Runner`."""
        arms = {"tuned": self._opened(*tuned), "untuned": self._opened(*untuned)}

        @contextlib.contextmanager
        def open_arms() -> Iterator[dict[str, Callable[[], object]]]:
            yield {name: engine.call(self._feeds) for name, engine in arms.items()}
            for engine in arms.values():
                engine.close()

        first = arms["tuned"]
        taken = measure.interleave_sessions(
            open_arms, first.clock, sessions=SESSIONS, seconds=COMPARED_SECONDS, threads=max(first.threads, 1)
        )
        return measure.ratio(taken["tuned"], taken["untuned"])


def timed(kernels: Sequence[Mapping[str, Any]], profile: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Symbol and seconds of each kernel, from the profile of an engine."""
    taken = zip(kernels, profile["microseconds"], strict=True)
    return [(kernel["symbol"], microseconds / 1e6) for kernel, microseconds in taken]


def spent(models: Sequence[Compiled], run: Run, loads: int) -> list[dict[int, float]]:
    """Seconds by origin that the kernels of each model take in one run of it.

    Args:
        models: which take turns.
        run: runs them.
        loads: how often each is opened: where memory happens to lie makes a difference of several percent. What counts
            is the fastest.
    """
    taken: list[list[Sequence[tuple[str, float]]]] = [[] for _ in models]
    for _ in range(loads):
        for runs, made in zip(taken, models, strict=True):
            runs.append(run(made))
    found: list[dict[int, float]] = []
    for runs, made in zip(taken, models, strict=True):
        origins = {kernel["symbol"]: kernel["origin"] for kernel in made.kernels if "origin" in kernel}
        of: dict[int, float] = {}
        for times in zip(*runs, strict=True):
            if (origin := origins.get(times[0][0])) is not None:
                of[origin] = of.get(origin, 0.0) + min(seconds for _, seconds in times)
        found.append(of)
    return found


def search(
    tasks: Tasks,
    plain: Compiled,
    compiled: Callable[[schedules.Pick], Compiled],
    runner: Runner,
    seconds: float,
    say: Callable[[str], None],
) -> int:
    """Measure choices until the time is up or none is left; what was measured is recorded at once.

    Args:
        tasks: the kernels; what is known of them grows.
        plain: the model without any choice.
        compiled: makes the same model with other choices.
        runner: runs both.
        seconds: to spend; what is under way when they are over is finished.
        say: told how far it is.

    Returns:
        the number of rounds.

    Raises:
        EnvironmentMissing: there is nothing left to run on.
    """
    begun = time.perf_counter()
    if any(not task.known for task in tasks.all) and seconds > 0:
        say("tuning: timing the kernels as they are")
        (times,) = runner.submit([plain], _LOADS).result()
        for task in tasks.all:
            if not task.known and task.kernel.origin in times:  # what no output needs is not run
                tasks.learn(task.kernel.origin, Choice(), times[task.kernel.origin] / task.count)
    untuned = sum(task.untuned for task in tasks.all)
    number = 0
    rounds: dict[Future[list[dict[int, float]]], Mapping[int, Choice]] = {}
    while True:
        trials, left = tasks.trials(), seconds - (time.perf_counter() - begun)
        best, share = sum(task.tuned for task in tasks.all), 1 - left / seconds if trials and left > 0 else 1.0
        minutes, rest = divmod(max(int(left), 0), 60)
        say(
            f"tuning: round {number + 1}{runner.told}, {tasks.tried} trials made, {minutes}:{rest:02} left, "
            f"kernels take {best * 1e3:.3g} ms, {untuned * 1e3:.3g} ms untuned, {100 * share:.0f}%"
        )
        more = bool(trials) and left > 0
        if not more and not rounds:
            return number
        if more:
            number += 1
            tasks.begin(trials)
            try:
                rounds[runner.submit([plain, compiled(_trying(trials))], _LOADS)] = trials
            except EdgecompileError as error:
                rounds[_failed(error)] = trials
        if len(rounds) >= runner.at_once or not more:
            for future in wait(rounds, return_when=FIRST_COMPLETED).done:
                _learn(tasks, rounds.pop(future), future)


def _failed(error: EdgecompileError) -> Future[list[dict[int, float]]]:
    done: Future[list[dict[int, float]]] = Future()
    done.set_exception(error)
    return done


def _learn(tasks: Tasks, trials: Mapping[int, Choice], future: Future[list[dict[int, float]]]) -> None:
    """Add what a round measured.

    Raises:
        EnvironmentMissing: there was nothing to run it on.
    """
    try:
        before, after = future.result()
    except EnvironmentMissing:  # which says nothing of the kernels
        raise
    except EdgecompileError:
        for origin in _unbuildable(tasks, trials):
            tasks.learn(origin, trials[origin], _FAILED)
        return
    for task in tasks.all:
        if (origin := task.kernel.origin) in trials:
            tasks.learn(origin, trials[origin], task.known[Choice()] * after[origin] / before[origin])


def _trying(trials: Mapping[int, Choice]) -> schedules.Pick:
    """Picks what is to be tried, and nothing else."""
    return lambda kernel: trials.get(kernel.origin, Choice())


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


@dataclass(frozen=True)
class Tuned:
    """A tuned build.

    Attributes:
        kernels: as ``lower.build`` returns them.
        files: names of what was written beside the library: the records that make it again, none if the cost models'
            choice was best.
        note: what tuning came to, for people.
    """

    kernels: Sequence[Mapping[str, Any]]
    files: tuple[str, ...]
    note: str


def build(
    graph: Graph,
    chosen: Options,
    path: Path,
    runner: Callable[[], Runner],
    say: Callable[[str], None] | None = None,
) -> Tuned:
    """Compile ``graph`` with the kernels that tuning finds, or has found.

    Args:
        graph, chosen, path, say: as for :func:`edgecompile.targets.tvm.lower.build`; ``chosen`` asks for tuning.
        runner: makes what kernels are timed on, if a search is asked for.

    Raises:
        InputError: as ``lower.build``; the records cannot be used; another search runs; or ``runner`` raises it.
        EnvironmentMissing: there is nothing left to run on. What was measured until then is recorded.
    """
    begun = time.perf_counter()
    if chosen.tuning:
        tasks = Tasks(Records(Path(chosen.tuning), chosen, write=False))
        module = lower.folded(graph, chosen, say)
        made = lower.compiled(module, graph, chosen, lambda kernel: tasks.add(kernel) or tasks.best(kernel))
        made.export(path, chosen)
        files = _kept(tasks, chosen, path.parent, summary(tasks, chosen))
        return Tuned(_without_origin(made.kernels), files, f"{_changed(tasks)}, by the records of {chosen.tuning}")
    with contextlib.closing(runner()) as run, _alone_in(folder := cache_folder(chosen, run.boards)):
        tasks = Tasks(Records(folder, chosen))
        try:
            return _searched(graph, chosen, path, run, tasks, folder, say or (lambda _: None), begun)
        except EnvironmentMissing as error:
            kept = f"{tasks.tried} trials were recorded before, and the same command goes on from there"
            raise EnvironmentMissing(error.what, "; ".join(filter(None, (error.why, kept))), error.fix) from None


def _searched(
    graph: Graph,
    chosen: Options,
    path: Path,
    run: Runner,
    tasks: Tasks,
    folder: Path,
    say: Callable[[str], None],
    begun: float,
) -> Tuned:
    """A search that began at a time on the clock ``perf_counter``, and what is left to do when its time is up."""
    forms: schedules.Forms = {}
    module = lower.folded(graph, chosen, say)
    imported = time.perf_counter()
    plain = lower.compiled(module, graph, chosen, lambda kernel: tasks.add(kernel) or Choice(), forms)

    def compiled(pick: schedules.Pick) -> Compiled:
        return lower.varied(plain, module, chosen, pick, forms)

    now, asked = time.perf_counter(), chosen.tune or 0.0
    end = _BUILDS * (now - imported)
    if asked:
        say(
            f"tuning: of {asked:.0f} s, {now - begun:.0f} went into the untuned model and {end:.0f} are kept for "
            "the end" + ("" if asked > now - begun + end else ", which leaves no time to search: ask for more")
        )
    rounds = search(tasks, plain, compiled, run, asked - (now - begun) - end, say)
    kept, ratio = plain, None
    if _confirmed(tasks, plain, compiled, run, say):
        with tempfile.TemporaryDirectory(prefix="edgecompile-") as scratch:
            tuned = lower.compiled(module, graph, chosen, tasks.best)
            made = [(Path(scratch) / f"{i}.so", model) for i, model in enumerate((tuned, plain))]
            for place, model in made:
                model.export(place, chosen)
            ratio = run.compare(*((place, model.kernels) for place, model in made))
            kept = tuned if ratio.high < 1 else plain
            untuned = "" if kept is tuned else " is not faster for certain, the untuned engine is kept"
            say(f"tuning: {shown(ratio)}{untuned}")
            shutil.move(made[0 if kept is tuned else 1][0], path)
    else:
        plain.export(path, chosen)
    found = summary(tasks, chosen, rounds, ratio)
    write_atomic(folder / FACTS, [json.dumps(found, indent=1).encode()])
    if kept is plain or ratio is None:
        return Tuned(_without_origin(plain.kernels), (), "tuning found nothing that is faster for certain")
    files = _kept(tasks, chosen, path.parent, found)
    return Tuned(_without_origin(kept.kernels), files, f"{_changed(tasks)}: {shown(ratio)}")


def shown(ratio: Ratio) -> str:
    """What tuning is worth, in words."""
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) of the untuned time"


def _changed(tasks: Tasks) -> str:
    other = sum(task.count for task in tasks.all if task.best != Choice())
    return f"tuned: {other} of {sum(task.count for task in tasks.all)} kernels are not what the cost models chose"


def _confirmed(
    tasks: Tasks,
    plain: Compiled,
    compiled: Callable[[schedules.Pick], Compiled],
    runner: Runner,
    say: Callable[[str], None],
) -> bool:
    """Whether the best choices are still faster when they are measured again; those that are not are dropped."""
    for _ in range(_CONFIRMATIONS):
        if not (picked := [task.kernel.origin for task in tasks.all if task.best != Choice()]):
            break
        say(f"tuning: measuring the best choices for {len(picked)} kernels again")
        before, after = runner.submit([plain, compiled(tasks.best)], 2 * _LOADS).result()
        for origin in picked:
            tasks.confirm(origin, after[origin] / before[origin])
    else:
        picked = [task for task in tasks.all if task.best != Choice()]
    if not picked:
        say("tuning found no kernel that is faster")
    return bool(picked)


def _without_origin(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kernels as they are stored."""
    return [{name: value for name, value in kernel.items() if name != "origin"} for kernel in kernels]


def summary(tasks: Tasks, chosen: Options, rounds: int = 0, ratio: Ratio | None = None) -> dict[str, Any]:
    """What was found: :func:`facts`, each kernel with its best choice, how much was tried, and what it is worth."""
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
    found = {**facts(chosen), "rounds": rounds, "trials": tasks.tried, "kernels": rows}
    return {**found, "ratio": ratio.as_dict()} if ratio else found


def _kept(tasks: Tasks, chosen: Options, folder: Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Write the records of what a model uses, and what was found, into the folder of its engine."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    records = Records(folder, chosen)
    for task in tasks.all:
        if (best := task.best) != Choice():
            for choice in (Choice(), best):
                records.add(task.kernel, choice, task.known[choice])
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
