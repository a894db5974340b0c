"""What was measured over time: one line of JSON per run, only ever appended, and where its level changed.

Change points are advisory. They are found as Hunter does: E-divisive proposes splits, a t-test decides about them, and
a smallest change worth telling is demanded; here the test is corrected for the number of places a split could be, so
that noise alone hardly ever yields one.

Sources: Matteson and James, "A Nonparametric Approach for Multiple Change Point Analysis of Multivariate Data", JASA
109 (2014), section 2 (the energy statistic); Fleming, Kołaczkowski et al., "Hunter: Using Change Point Detection to
Hunt for Performance Regressions", ICPE 2023, section 3 (windows, t-test, merging of weak change points).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import numpy as np

import edgecompile
from edgecompile import documents
from edgecompile.errors import InputError

SCHEMA = "edgecompile.history/1"  # of a line
TRENDS_SCHEMA = "edgecompile.trends/1"
DEFAULT = Path(".edgecompile/history.jsonl")
P_VALUE = 0.001
MAGNITUDE = 0.02
_WEAK = 0.05  # a split inside a window is kept until all the data has judged it: the edge of a pulse is weak by itself
_WINDOW = 60
_SHORTEST = 5  # values on either side of a change point; fewer would make a level of a few odd runs
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        time: UTC time in ISO 8601.
        kind: ``bench`` or ``gate``.
        model: its name.
        target: name of the target.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        values: what was measured, by metric (``latency_p50``); times in seconds, sizes in bytes.
        intervals: lower and upper confidence bound of those values that have one.
        fingerprint: key of the machine; only entries of one key can be compared.
        commit: of the checkout in which it ran, or ``""``.
        version: of edgecompile.
        digest: SHA-256 of the bundle's manifest, or ``""``.
        verdict: of a gate, or ``""``.
    """

    time: str
    kind: str
    model: str
    target: str
    precision: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    fingerprint: str = ""
    commit: str = ""
    version: str = edgecompile.__version__
    digest: str = ""
    verdict: str = ""

    @classmethod
    def now(cls, kind: str, model: str, target: str, precision: str, values: Mapping[str, float], **rest: Any) -> Entry:
        """An entry of this moment and of the commit that is checked out here; ``rest`` are further fields."""
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(time, kind, model, target, precision, values, **{"commit": commit(), **rest})

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What it may be compared within: model, target, precision, fingerprint."""
        return self.model, self.target, self.precision, self.fingerprint

    @property
    def when(self) -> datetime:
        """:attr:`time` as a time in UTC."""
        return _when(self.time)


_DERIVED: documents.Derived = {Entry: {"schema": lambda _: SCHEMA}}


def commit(folder: Path | None = None) -> str:
    """The commit that is checked out in a folder (the current one if None), or ``""``."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"],
            cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=2,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def append(entry: Entry, path: Path = DEFAULT) -> None:
    """Add a line; what is in the file is never touched, except that a torn last line gets its end.

    Several processes may append at once.

    Raises:
        InputError: the file cannot be written; then it is as it was.
    """
    line = json.dumps(documents.encode(entry, _DERIVED), allow_nan=False).encode("ascii") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            _append(path, line)
    except (OSError, filelock.Timeout) as error:
        why = "another process holds its lock" if isinstance(error, filelock.Timeout) else error.strerror or str(error)
        raise InputError(f"cannot append to {path}", why, "check the folder and free space") from None


def _append(path: Path, line: bytes) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        before = os.fstat(handle).st_size
        torn = before and os.pread(handle, 1, before - 1) != b"\n"
        whole = b"\n" * bool(torn) + line
        if os.write(handle, whole) != len(whole):  # the disk is full
            os.ftruncate(handle, before)
            raise OSError(None, "the line could not be written whole")
        os.fsync(handle)
    finally:
        os.close(handle)


def read(
    path: Path = DEFAULT,
    model: str | None = None,
    fingerprint: str | None = None,
    *,
    warn: Callable[[str], object] = warnings.warn,
) -> list[Entry]:
    """The entries in order of time; none if there is no file.

    Args:
        path: the file.
        model, fingerprint: to keep only theirs.
        warn: called with a sentence if lines were left out: torn, or of something else, or of a later version.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read", error.strerror or str(error)) from None
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            entry = _entry(line)
            if entry is None:
                bad.append(number)
            elif model in (None, entry.model) and fingerprint in (None, entry.fingerprint):
                found.append(entry)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        what = "line" if len(bad) == 1 else f"{len(bad)} lines:"
        warn(f"{path}: {what} {shown} cannot be read as {SCHEMA} and is left out")
    return sorted(found, key=lambda entry: entry.when)


def _entry(line: bytes) -> Entry | None:
    try:
        document = json.loads(line)
        if document["schema"] != SCHEMA:
            return None
        entry: Entry = documents.decode(Entry, document, "entry", _DERIVED)
        _when(entry.time)
        return entry if all(len(bounds) == 2 for bounds in entry.intervals.values()) else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _when(text: str) -> datetime:
    time = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the Z
    return time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time.astimezone(timezone.utc)


# -- change points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChangePoint:
    """Where the level of a series changed.

    Attributes:
        index: of the first value of the new level.
        before, after: geometric mean of the values since the last change point, and up to the next.
        p: of the t-test between the two levels, times the number of places a change could be; at most 1.
    """

    index: int
    before: float
    after: float
    p: float

    @property
    def change(self) -> float:
        """Relative change of the level: 0.05 for 5 % more."""
        return self.after / self.before - 1


def change_points(
    values: Sequence[float], *, p_value: float = P_VALUE, magnitude: float = MAGNITUDE
) -> list[ChangePoint]:
    """Where the level of positive values, such as latencies in order of time, changed.

    Values that are not positive and finite are left out, but count in the positions. Works on logarithms, in windows
    of 60 values that overlap by half. A change is told once five values follow it.

    Args:
        values: in order of time.
        p_value: of the t-test, after correction for the number of places where a change could be.
        magnitude: the smallest relative change to tell.
    """
    numbers = np.asarray(values, np.float64)
    kept = np.flatnonzero(np.isfinite(numbers) & (numbers > 0))
    logs = np.log(numbers[kept])
    splits = _candidates(logs)
    while splits:
        splits = _moved(logs, splits)
        tests = _tests(logs, splits)
        worst = max(range(len(splits)), key=lambda i: (_small(tests[i], magnitude), tests[i][2]))
        if tests[worst][2] <= p_value and not _small(tests[worst], magnitude):
            return [
                ChangePoint(int(kept[at]), math.exp(before), math.exp(after), p)
                for at, (before, after, p) in zip(splits, tests, strict=True)
            ]
        del splits[worst]
    return []


def _candidates(logs: np.ndarray) -> list[int]:
    """Splits that some window of the series proposes, in order."""
    found: set[int] = set()
    last = max(len(logs) - _WINDOW, 0)
    for start in {*range(0, last, _WINDOW // 2), last}:
        found |= {start + at for at in _divide(logs[start : start + _WINDOW])}
    return sorted(found)


def _divide(logs: np.ndarray) -> list[int]:
    """Split recursively where the energy statistic is largest, as long as a t-test sees anything in the split."""
    at = _best_split(logs)
    if at is None or _p(logs[:at], logs[at:]) > _WEAK:
        return []
    return [*_divide(logs[:at]), at, *(at + later for later in _divide(logs[at:]))]


def _best_split(logs: np.ndarray) -> int | None:
    """Where two parts differ most: nm/(n+m) (2 E|X-Y| - E|X-X'| - E|Y-Y'|), with all means over ordered pairs."""
    n = len(logs)
    if n < 2 * _SHORTEST:
        return None
    distances = np.abs(logs[:, None] - logs[None, :])
    corner = distances.cumsum(0).cumsum(1).diagonal()  # sum within the first k + 1 values
    whole, row = corner[-1], distances.sum(1).cumsum()
    left = np.arange(_SHORTEST, n - _SHORTEST + 1)
    right = n - left
    first = corner[left - 1]
    between = row[left - 1] - first
    second = whole - first - 2 * between
    statistic = left * right / n * (2 * between / (left * right) - first / left**2 - second / right**2)
    return int(left[np.argmax(statistic)])


def _moved(logs: np.ndarray, splits: Sequence[int]) -> list[int]:
    """Each split where the levels between its neighbours differ most."""
    moved = list(splits)
    for i in range(len(moved)):
        start = max(moved[i - 1] if i else 0, moved[i] - _WINDOW)
        end = min(moved[i + 1] if i + 1 < len(moved) else len(logs), moved[i] + _WINDOW)
        at = _best_split(logs[start:end])
        if at is not None:
            moved[i] = start + at
    return moved


def _tests(logs: np.ndarray, splits: Sequence[int]) -> list[tuple[float, float, float]]:
    """Level before, level after and p of each split."""
    edges = [0, *splits, len(logs)]
    places = max(len(logs) - 2 * _SHORTEST + 1, 1)
    found = []
    for start, at, end in zip(edges, edges[1:], edges[2:], strict=False):
        before, after = logs[start:at], logs[at:end]
        found.append((float(before.mean()), float(after.mean()), min(1.0, _p(before, after) * places)))
    return found


def _small(test: tuple[float, float, float], magnitude: float) -> bool:
    return abs(math.expm1(test[1] - test[0])) < magnitude


def _p(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p of Student's t-test with pooled variance."""
    from scipy import stats

    n, m = len(before), len(after)
    if min(n, m) < 2:
        return 1.0
    difference = abs(float(after.mean() - before.mean()))
    squares = float(((before - before.mean()) ** 2).sum() + ((after - after.mean()) ** 2).sum())
    # Below the rounding of the logarithms themselves, two levels are equal or differ for certain.
    error = math.sqrt(squares / (n + m - 2) * (1 / n + 1 / m))
    if error <= 1e-12:
        return 0.0 if difference > 1e-9 else 1.0
    return float(2 * stats.t.sf(difference / error, n + m - 2))


# -- trends ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trend:
    """One metric of what can be compared: one model, target, precision and machine.

    Attributes:
        metric: the key of :attr:`Entry.values`.
        entries: those that have it, in order of time; at least one.
        points: where its level changed.
    """

    metric: str
    entries: tuple[Entry, ...]
    points: tuple[ChangePoint, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The metric, in order of time."""
        return tuple(entry.values[self.metric] for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """The trend ready for JSON; change points with the entry they begin at."""
        first = self.entries[0]
        points = [
            {
                **asdict(p),
                "change": p.change,
                "time": self.entries[p.index].time,
                "commit": self.entries[p.index].commit,
            }
            for p in self.points
        ]
        told = ("time", "kind", "commit", "version", "digest", "verdict")
        runs = [
            {"value": e.values[self.metric], "interval": e.intervals.get(self.metric)}
            | {k: getattr(e, k) for k in told}
            for e in self.entries
        ]
        series = {key: getattr(first, key) for key in ("model", "target", "precision", "fingerprint")}
        return documents.encode({**series, "metric": self.metric, "runs": runs, "change_points": points}, {})


def trends(entries: Sequence[Entry], metric: str | None = None) -> list[Trend]:
    """What changed over time, by what can be compared and by metric, in the order in which each first appears.

    Args:
        entries: in order of time, as :func:`read` gives them.
        metric: to keep only this one.
    """
    grouped: dict[tuple[tuple[str, ...], str], list[Entry]] = {}
    for entry in entries:
        for name in entry.values:
            if metric in (None, name):
                grouped.setdefault((entry.series, name), []).append(entry)
    return [
        Trend(name, tuple(group), tuple(change_points([entry.values[name] for entry in group])))
        for (_, name), group in grouped.items()
    ]


def as_dict(found: Sequence[Trend]) -> dict[str, Any]:
    """Trends for ``--json``."""
    return {"schema": TRENDS_SCHEMA, "trends": [trend.as_dict() for trend in found]}
