"""Latency that can be compared: several arms in one run, alternated in short blocks in random order.

Every arm sees the same machine, so load, clock frequency and temperature cancel in :func:`ratio`, which compares the
arms round by round. One thread is timed with its CPU time, which does not grow when others use the machine; several
threads need the wall clock, which does.

Two sessions of the very same model differ by a few percent, in memory layout if nothing else, and no number of calls
averages that out. :func:`interleave_sessions` therefore opens the arms anew several times, and the pair of sessions is
the unit of evidence.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import platform
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompile.errors import InputError
from edgecompile.files import write_atomic

CLOCKS: Mapping[str, Callable[[], int]] = {"thread_cpu": time.thread_time_ns, "wall": time.perf_counter_ns}

# The largest of n samples lies above the 99th percentile with probability 1 - 0.99**n, which first reaches 99 % here.
P99_SAMPLES = 459
SAMPLES_SCHEMA = "edgecompile.samples/1"
_ARRAYS = ("seconds", "rounds", "sessions", "wall")
_WARM_AGREEMENT, _WARM_SECONDS, _WARM_CALLS = 0.03, 2.0, 3


@dataclass(frozen=True, eq=False)
class Samples:
    """Durations of the calls of one arm.

    Attributes:
        label: name of the arm.
        clock: ``"thread_cpu"``, ``"wall"`` or ``"cuda_event"``.
        seconds: duration of each call in seconds, in the order they were made; float64 [calls].
        threads: CPU threads that the arm uses.
        rounds: number of the round that each call belongs to; int64 [calls].
        overhead: what an empty call costs on this clock, in seconds; it is contained in ``seconds``.
        load: one-minute load average of the machine before and after the run.
        sessions: number of the session that each call belongs to, int64 [calls]; None if there was one only.
        wall: wall time of each call in seconds, float64 [calls], where ``clock`` is another; else None.
    """

    label: str
    clock: str
    seconds: np.ndarray
    threads: int
    rounds: np.ndarray
    overhead: float = 0.0
    load: tuple[float, float] = (0.0, 0.0)
    sessions: np.ndarray | None = None
    wall: np.ndarray | None = None

    def percentile(self, q: float) -> float:
        """The ``q``-th percentile of a call, in seconds."""
        return float(np.percentile(self.seconds, q))

    @property
    def p50(self) -> float:
        """Median duration of a call, in seconds."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """90th percentile, in seconds."""
        return self.percentile(90)

    @property
    def p99(self) -> float | None:
        """99th percentile in seconds, or None below 459 calls, which cannot show it with 99 % confidence."""
        return self.percentile(99) if len(self.seconds) >= P99_SAMPLES else None

    def as_dict(self) -> dict[str, Any]:
        """The figures for a report; times in milliseconds and microseconds as the keys say."""
        return {
            "label": self.label,
            "clock": self.clock,
            "threads": self.threads,
            "calls": len(self.seconds),
            "rounds": len(np.unique(self.rounds)),
            "p50_ms": self.p50 * 1e3,
            "p90_ms": self.p90 * 1e3,
            "p99_ms": None if self.p99 is None else self.p99 * 1e3,
            "min_ms": float(self.seconds.min()) * 1e3,
            "mean_ms": float(self.seconds.mean()) * 1e3,
            "overhead_us": self.overhead * 1e6,
            "load_before": self.load[0],
            "load_after": self.load[1],
        }


def save(path: Path, samples: Mapping[str, Samples], **facts: Any) -> None:
    """Write raw samples, exactly, as one ``.npz`` file.

    Args:
        path: the file; written whole or not at all.
        samples: by name; the arrays are stored as ``NUMBER.FIELD`` in this order.
        facts: whatever else belongs to them, ready for JSON.

    Raises:
        InputError: it cannot be written.
    """
    arrays: dict[str, Any] = {}
    described = []
    for number, (name, one) in enumerate(samples.items()):
        fields = vars(one)
        arrays |= {f"{number}.{key}": fields[key] for key in _ARRAYS if fields[key] is not None}
        described.append({"name": name, **{k: v for k, v in fields.items() if k not in _ARRAYS}})
    text = json.dumps({"schema": SAMPLES_SCHEMA, "samples": described, "facts": facts})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(text.encode(), np.uint8), **arrays)
    write_atomic(path, [buffer.getbuffer()])


def load(path: Path) -> tuple[dict[str, Samples], dict[str, Any]]:
    """Read what :func:`save` wrote: the samples by name, and the facts.

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["schema"] != SAMPLES_SCHEMA:
                raise ValueError(f"its schema is {header['schema']!r}, not {SAMPLES_SCHEMA!r}")
            found = {}
            for number, one in enumerate(header["samples"]):
                arrays = {key: stored[f"{number}.{key}"] for key in _ARRAYS if f"{number}.{key}" in stored.files}
                name = str(one.pop("name"))
                found[name] = Samples(**{**one, **arrays, "load": tuple(one["load"])})
            return found, dict(header["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path} cannot be read as recorded samples", why, "give the samples.npz of a run") from None


@dataclass(frozen=True)
class Ratio:
    """Latency of a candidate over that of a baseline.

    Attributes:
        value: median over the pairs of sessions; of each pair, the median over its rounds of the ratio of the two
            block medians. With one pair, the median over its rounds.
        low: lower end of the confidence interval of that median.
        high: upper end.
        confidence: coverage of the interval; below what was asked if there are too few pairs or rounds.
        rounds: what was compared: pairs of sessions, or rounds of the only pair.
    """

    value: float
    low: float
    high: float
    confidence: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    clock: str,
    *,
    seconds: float = 2.0,
    min_calls: int = 20,
    block_ms: float = 15.0,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
    now: Callable[[], int] | None = None,
) -> dict[str, Samples]:
    """Time several arms in one run.

    Each arm is warmed up until the medians of two successive blocks agree within 3 % (for 2 s at most). Then come
    rounds: in each, every arm runs one block, in an order drawn anew. A block lasts ``block_ms`` and holds one call at
    least; where it holds many, a first call that finds the caches full of another arm's data is not timed.

    Args:
        calls: arm name -> a function that does the work once.
        clock: ``"thread_cpu"`` (the work must happen in the calling thread) or ``"wall"``.
        seconds: wall time to spend per arm after the warm-up.
        min_calls: calls per arm to make in any case, however long they take.
        block_ms: length of a block in milliseconds.
        threads: CPU threads that the arms use, for the record.
        seed: of the order of the blocks.
        progress: called after each round with the fraction done.
        now: reads the clock in ns, where it is not one of :data:`CLOCKS`.

    Returns:
        the samples by arm name, in the order of ``calls``.

    Raises:
        ValueError: ``calls`` is empty or the clock is unknown.
    """
    if not calls:
        raise ValueError("nothing to measure")
    if now is None and clock not in CLOCKS:
        raise ValueError(f"no clock is called {clock!r}; there are {', '.join(CLOCKS)}")
    now, block = now or CLOCKS[clock], int(block_ms * 1e6)
    rng = np.random.default_rng(seed)
    names = list(calls)
    taken: dict[str, list[int]] = {name: [] for name in names}
    walls: dict[str, list[int]] = {name: [] for name in names}
    rounds: dict[str, list[int]] = {name: [] for name in names}
    before = os.getloadavg()[0]
    with _no_garbage_collection():
        overhead = _overhead(now)
        typical = {name: _warm_up(call, now, block) for name, call in calls.items()}
        start, budget, number = time.perf_counter(), seconds * len(names), 0
        while True:
            for name in (names[i] for i in rng.permutation(len(names))):
                if typical[name] * 8 < block:
                    calls[name]()
                durations, wall = _block(calls[name], now, block)
                taken[name] += durations
                walls[name] += wall
                rounds[name] += [number] * len(durations)
            number += 1
            spent = (time.perf_counter() - start) / budget if budget > 0 else 1.0
            made = min(map(len, taken.values())) / max(min_calls, 1)
            if progress is not None:
                progress(min(spent, made, 1.0))
            if spent >= 1 and made >= 1:
                break
    load = (before, os.getloadavg()[0])
    return {
        name: Samples(
            name,
            clock,
            np.array(taken[name], np.float64) / 1e9,
            threads,
            np.array(rounds[name]),
            overhead,
            load,
            wall=None if clock == "wall" else np.array(walls[name], np.float64) / 1e9,
        )
        for name in names
    }


def interleave_sessions(
    open_arms: Callable[[], AbstractContextManager[Mapping[str, Callable[[], object]]]],
    clock: str,
    *,
    sessions: int = 6,
    seconds: float = 2.0,
    min_calls: int = 12,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Samples]:
    """:func:`interleave` arms that are opened anew ``sessions`` times.

    Args:
        open_arms: opens every arm; its context closes them.
        clock: as for :func:`interleave`.
        sessions: how often; six are the fewest that give a 95 % interval.
        seconds: wall time to spend per arm, over all sessions.
        min_calls: calls per arm, over all sessions.
        threads, seed, progress: as for :func:`interleave`.
    """
    runs: list[dict[str, Samples]] = []
    for number in range(sessions):
        with open_arms() as calls:
            runs.append(
                interleave(
                    calls,
                    clock,
                    seconds=seconds / sessions,
                    min_calls=-(-min_calls // sessions),
                    threads=threads,
                    seed=seed + number,
                )
            )
        if progress is not None:
            progress((number + 1) / sessions)
    return {name: joined([run[name] for run in runs]) for name in runs[0]}


def joined(runs: Sequence[Samples]) -> Samples:
    """The samples of one arm from successive sessions, as if taken in one run; sessions are numbered from 0."""
    firsts = np.cumsum([0, *(int(r.rounds[-1]) + 1 for r in runs[:-1])])
    return replace(
        runs[0],
        seconds=np.concatenate([r.seconds for r in runs]),
        rounds=np.concatenate([r.rounds + first for r, first in zip(runs, firsts, strict=True)]),
        sessions=np.concatenate([np.full(len(r.rounds), i) for i, r in enumerate(runs)]),
        wall=None if runs[0].wall is None else np.concatenate([r.wall for r in runs if r.wall is not None]),
        overhead=float(np.median([r.overhead for r in runs])),
        load=(runs[0].load[0], runs[-1].load[1]),
    )


def ratio(candidate: Samples, baseline: Samples, confidence: float = 0.95) -> Ratio:
    """Compare two arms of one run, round by round, then pair of sessions by pair of sessions.

    The interval is that of the sign test: it assumes nothing about the distribution of the ratios but that the pairs
    are independent (Conover, Practical Nonparametric Statistics, section 3.2).

    Raises:
        ValueError: the arms have no round in common.
    """
    ours, theirs = _rounds(candidate, np.median), _rounds(baseline, np.median)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError(f"{candidate.label!r} and {baseline.label!r} were not measured in one run")
    of_session: dict[int, list[float]] = {}
    for number in common:
        session = 0
        if candidate.sessions is not None:
            session = int(candidate.sessions[np.searchsorted(candidate.rounds, number)])
        of_session.setdefault(session, []).append(ours[number] / theirs[number])
    pairs = list(of_session.values())
    ratios = np.sort([float(np.median(p)) for p in pairs] if len(pairs) > 1 else pairs[0])
    n = len(ratios)
    rank, coverage = _sign_interval(n, confidence)
    return Ratio(float(np.median(ratios)), float(ratios[rank - 1]), float(ratios[n - rank]), coverage, n)


def log_ratio(candidate: Samples, baseline: Samples) -> float:
    """What one pair of sessions says: the median over its rounds of log(q25 of the candidate / q25 of the baseline).

    The lower quartile of a block is hardly moved by what else the machine does, and the two blocks of a round see the
    same machine.

    Raises:
        ValueError: the arms have no round in common.
    """
    ours, theirs = _rounds(candidate, _lower_quartile), _rounds(baseline, _lower_quartile)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise ValueError(f"{candidate.label!r} and {baseline.label!r} were not measured in one run")
    return float(np.median([math.log(ours[number] / theirs[number]) for number in common]))


def by_session(samples: Samples) -> list[Samples]:
    """The samples of each session, in order."""
    if samples.sessions is None:
        return [samples]
    parts = [samples.sessions == number for number in np.unique(samples.sessions)]
    wall = samples.wall
    return [
        replace(
            samples,
            seconds=samples.seconds[p],
            rounds=samples.rounds[p],
            sessions=None,
            wall=None if wall is None else wall[p],
        )
        for p in parts
    ]


def on_wall_clock(samples: Samples) -> Samples:
    """The same calls by the wall clock."""
    return samples if samples.wall is None else replace(samples, clock="wall", seconds=samples.wall, wall=None)


def _rounds(samples: Samples, statistic: Callable[[np.ndarray], float]) -> dict[int, float]:
    """A statistic of each round's block, by number of the round."""
    starts = np.flatnonzero(np.diff(samples.rounds, prepend=-1))
    blocks = np.split(samples.seconds, starts[1:])
    return {int(samples.rounds[s]): float(statistic(b)) for s, b in zip(starts, blocks, strict=True)}


def _lower_quartile(block: np.ndarray) -> float:
    return float(np.percentile(block, 25))


def _sign_interval(n: int, confidence: float) -> tuple[int, float]:
    """Rank k such that the k-th smallest and k-th largest of n values enclose the median, and with what probability."""
    rank, coverage, tail = 1, 0.0, 0.0
    for below in range((n + 1) // 2):  # P(at most `below` values lie under the median), binomial with p = 1/2
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(below + 1) - math.lgamma(n - below + 1) - n * math.log(2))
        if below and 1 - 2 * tail < confidence:
            break
        rank, coverage = below + 1, 1 - 2 * tail
    return rank, max(coverage, 0.0)


def _block(call: Callable[[], object], now: Callable[[], int], length: int) -> tuple[list[int], list[int]]:
    """Durations in ns, by ``now`` and of wall time, of calls made in a row for ``length`` ns of wall time."""
    wall = time.perf_counter_ns
    durations, walls = [], []
    begun = wall()
    end = begun + length
    while True:
        start = now()
        call()
        durations.append(now() - start)
        stop = wall()
        walls.append(stop - begun)
        if stop >= end:
            return durations, walls
        begun = stop


def _warm_up(call: Callable[[], object], now: Callable[[], int], block: int) -> float:
    """Run until two successive blocks agree; returns the wall time of one call in ns."""
    deadline = time.perf_counter() + _WARM_SECONDS
    previous, made = math.inf, 0
    while True:
        start = time.perf_counter_ns()
        durations, _ = _block(call, now, block)
        typical = (time.perf_counter_ns() - start) / len(durations)
        made += len(durations)
        median = float(np.median(durations))
        settled = abs(median - previous) <= _WARM_AGREEMENT * median
        if made >= _WARM_CALLS and (settled or time.perf_counter() >= deadline):
            return typical
        previous = median


def _overhead(now: Callable[[], int]) -> float:
    """Duration of an empty call as :func:`_block` measures it, in seconds."""
    return float(np.median(_block(lambda: None, now, 2_000_000)[0])) / 1e9


@contextmanager
def _no_garbage_collection():
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- the machine -------------------------------------------------------------------------------------------------------

# Instruction sets that change which kernels a runtime picks, by the name that Linux gives them.
_FEATURES = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    "avx512_vpopcntdq",
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def machine() -> dict[str, Any]:
    """The machine as far as latency depends on it: ready for JSON; what cannot be read is ``""``, None or empty.

    Keys: ``arch``, ``cpu`` (model name), ``features`` (instruction sets), ``board`` (name in the device tree),
    ``hypervisor``, ``cpus`` (logical, online), ``affinity`` (CPUs this process may use), ``cores`` (physical ones it
    may use), ``governor``, ``memory_bytes``, ``load`` (1, 5 and 15 minutes), ``system``, ``python``.
    """
    info = _cpuinfo()
    flags = _flags(info)
    return {
        "arch": platform.machine(),
        "cpu": info.get("model name") or info.get("hardware") or _arm_part(info) or platform.processor(),
        "features": list(cpu_features()),
        "board": _read("/proc/device-tree/model").rstrip("\0"),
        "hypervisor": "hypervisor" in flags,
        "cpus": os.cpu_count(),
        "affinity": _ranges(affinity()),
        "cores": available_cores(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": _memory(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cpu_features() -> tuple[str, ...]:
    """Instruction sets of this CPU that matter to inference, in a fixed order."""
    flags = _flags(_cpuinfo())
    return tuple(f for f in _FEATURES if f in flags)


def cpu() -> str:
    """This CPU as code compiled for it depends on it: architecture, then :func:`cpu_features`."""
    return " ".join([platform.machine(), *cpu_features()])


def lacking(device: str) -> list[str]:
    """What this CPU lacks of one that is described as :func:`cpu` does."""
    have = cpu().split()
    return [part for part in device.split() if part not in have]


def affinity() -> list[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core(cpu: int, read: Callable[[str], str] | None = None) -> str:
    """The physical core of a CPU, as the list of all CPUs that it appears as; ``""`` if the machine does not tell.

    Args:
        cpu: its number.
        read: reads a small file of the machine that has it, ``""`` if there is none; by default of this one.
    """
    return (read or _read)(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")


def for_threads(cpus: Iterable[int], read: Callable[[str], str] | None = None) -> list[int]:
    """CPUs in the order in which threads should get them: fast cores first, and one CPU of each core before its others.

    Args:
        cpus: their numbers.
        read: as for :func:`core`.
    """
    cores, ranked = set(), []
    for cpu in cpus:
        of = core(cpu, read) or str(cpu)
        hertz = (read or _read)(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq")
        ranked.append((of in cores, -int(hertz) if hertz.isdigit() else 0, cpu))
        cores.add(of)
    return [cpu for *_, cpu in sorted(ranked)]


def available_cores() -> int:
    """Physical cores that this process may use: by affinity, and at most what a container's CPU quota gives."""
    cores = {core(cpu) or cpu for cpu in affinity()}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else len(cores)
    return max(1, min(len(cores), limit))


def _cpuinfo() -> dict[str, str]:
    """The first value of each key of /proc/cpuinfo, keys in lower case."""
    found: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip().lower(), value.strip())
    return found


def _flags(info: Mapping[str, str]) -> set[str]:
    return set((info.get("flags") or info.get("features") or "").split())


def _arm_part(info: Mapping[str, str]) -> str:
    part = info.get("cpu part")
    return f"ARM implementer {info.get('cpu implementer', '?')} part {part}" if part else ""


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3,8`` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
