"""The verdict of the gate: is the candidate the same model, as fast as its baseline, and within its budgets?

Latency is judged by pairs of sessions, measured side by side, here and now. Both engines are opened anew for each pair
and take turns in short blocks; a pair says one number, log(candidate / baseline), see
:func:`edgecompile.measure.log_ratio`. Now and then a pair holds the baseline twice: that tells whether the machine can
be trusted. After 10, 14, 20, 28 and 40 pairs :mod:`edgecompile.sequential` is asked for a verdict.

:func:`judge` is a function of what was recorded, and the only way to a verdict: a replay of the recording gives the
same result, bit for bit, because it is the same computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from edgecompile import measure, render_text, sequential
from edgecompile.errors import InputError
from edgecompile.measure import Samples
from edgecompile.sequential import Look, Plan
from edgecompile.verdict import FAIL, INCONCLUSIVE, PASS, Check

CANDIDATE, BASELINE, ANCHOR, AGAIN = "candidate", "baseline", "anchor", "again"
PAIR_SECONDS = 0.2  # of each engine in one pair of sessions, besides opening it and the warm-up
BUDGET_SESSIONS = 10  # of a candidate that is only held against a budget
# Budget -> what it is, its unit, and whether more is better.
BUDGETS: Mapping[str, tuple[str, str, bool]] = {
    "engine_size": ("engine size", "bytes", False),
    "build_time": ("build time", "s", False),
    "parity": ("error against its own source", "relative error", False),
    "accuracy": ("accuracy", "score", True),
    "peak_memory": ("peak memory", "bytes", False),
    "dla_fallback": ("layers that the DLA leaves to the GPU", "layers", False),
    "latency_p50": ("median latency", "s", False),
    "latency_p99": ("99th percentile of the latency", "s", False),
}


@dataclass(frozen=True)
class Settings:
    """What is allowed.

    Attributes:
        plan: how latency is compared.
        budgets: key of :data:`BUDGETS` -> what is allowed, in its unit.
        places: dotted key of the configuration -> ``FILE:LINE``, for annotations.
    """

    plan: Plan = field(default_factory=Plan)
    budgets: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What is known of one candidate besides its samples.

    Attributes:
        name: of the candidate.
        parity: output -> largest difference, relative to the output's largest value.
        reference: what the outputs were compared with.
        tolerance: largest difference of an output that is allowed.
        measured: key of :data:`BUDGETS` -> what was found; a key is absent where it cannot be known.
        arms: the engines that take turns: ``candidate``, and ``baseline`` and ``anchor`` where there are any.
        dropped: why pairs were thrown away (a clock changed, the board was throttled).
        seconds: wall time spent measuring.
    """

    name: str
    parity: Mapping[str, float] = field(default_factory=dict)
    reference: str = ""
    tolerance: float = 1e-4
    measured: Mapping[str, float] = field(default_factory=dict)
    arms: tuple[str, ...] = (CANDIDATE,)
    dropped: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(eq=False)
class Subject:
    """One candidate and what was recorded of it.

    Attributes:
        facts: besides the samples.
        pairs: arm -> its samples, one item per pair.
        again: ``baseline`` and ``again`` -> samples of the pairs that hold the baseline twice.
    """

    facts: Facts
    pairs: dict[str, list[Samples]] = field(default_factory=dict)
    again: dict[str, list[Samples]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.facts.name

    @property
    def count(self) -> int:
        """Number of pairs kept."""
        return len(self.pairs.get(CANDIDATE, ()))

    @property
    def count_again(self) -> int:
        """Number of pairs kept that hold the baseline twice."""
        return len(self.again.get(AGAIN, ()))

    def differences(self, other: str) -> np.ndarray:
        """log(candidate / other) of each pair."""
        both = zip(self.pairs.get(CANDIDATE, ()), self.pairs.get(other, ()), strict=True)
        return np.array([measure.log_ratio(mine, theirs) for mine, theirs in both])

    def machine_differences(self) -> np.ndarray:
        """log(baseline / baseline) of each pair that holds it twice."""
        both = zip(self.again.get(AGAIN, ()), self.again.get(BASELINE, ()), strict=True)
        return np.array([measure.log_ratio(one, two) for one, two in both])


class Session(Protocol):
    """Opens the named arms anew, lets them take turns and returns their samples; a reason makes the pair void."""

    def __call__(self, arms: Mapping[str, str], seed: int) -> tuple[dict[str, Samples], str]:
        """``arms``: name of an arm -> which of the subject's engines it is."""
        ...


class Recorder:
    """Collects pairs of one subject for as long as they are asked for and the time allows."""

    def __init__(self, subject: Subject, session: Session, plan: Plan, seed: int = 0):
        self._subject, self._session, self._plan = subject, session, plan
        self._rng = np.random.default_rng(seed)

    def __call__(self, count: int) -> None:
        """Record until there are ``count`` pairs, or the time limit of the plan is reached."""
        subject, plan = self._subject, self._plan
        arms = subject.facts.arms
        same = plan.aa_pairs(count) if BASELINE in arms else 0
        while subject.count < count and subject.facts.seconds < plan.time_limit:
            start = time.perf_counter()
            if subject.count_again * count < same * (subject.count + 1):
                self._take({BASELINE: BASELINE, AGAIN: BASELINE}, subject.again)
            self._take({arm: arm for arm in arms}, subject.pairs)
            spent = subject.facts.seconds + time.perf_counter() - start
            subject.facts = replace(subject.facts, seconds=spent)

    def _take(self, arms: Mapping[str, str], into: dict[str, list[Samples]]) -> None:
        samples, void = self._session(arms, int(self._rng.integers(2**31)))
        if void:
            self._subject.facts = replace(self._subject.facts, dropped=(*self._subject.facts.dropped, void))
            return
        for arm, taken in samples.items():
            into.setdefault(arm, []).append(taken)


def judge(
    subjects: Sequence[Subject], settings: Settings, record: Callable[[Subject, int], None] | None = None
) -> list[Check]:
    """Every check of every subject, from what is recorded; with ``record``, more is recorded as it is needed.

    A subject that is another model is not timed.

    Args:
        subjects: the candidates.
        settings: what is allowed.
        record: called with a subject and a number of pairs; adds to the subject's recording. None in a replay.
    """
    collect = record or (lambda subject, count: None)
    checks: dict[str, list[Check]] = {s.name: [_parity(s, settings)] for s in subjects}
    same = [s for s in subjects if checks[s.name][0].verdict == PASS]
    for subject in same:
        checks[subject.name] += [
            _plain_budget(subject, key, settings)
            for key in settings.budgets
            if key in BUDGETS and not key.startswith("latency_")
        ]
    for check in _latency(same, settings, collect):
        checks[check.model].append(check)
    for subject in same:
        keys = [key for key in settings.budgets if key.startswith("latency_")]
        if keys:
            collect(subject, BUDGET_SESSIONS)
        if "latency_p99" in keys:
            _collect_calls(subject, _calls_for_p99(settings), collect)
        checks[subject.name] += [_latency_budget(subject, key, settings) for key in keys]
    return [check for subject in subjects for check in checks[subject.name]]


# -- the same model ----------------------------------------------------------------------------------------------------


def _parity(subject: Subject, settings: Settings) -> Check:
    facts = subject.facts
    name, worst = max(facts.parity.items(), key=lambda item: _severity(item[1]), default=("", math.nan))
    same = worst <= facts.tolerance  # not a number is not the same
    shown, allowed = render_text.error(worst), render_text.error(facts.tolerance)
    off = f"output {name} is off by {shown} of its largest value" if name else "there is no output to compare"
    return Check(
        id=f"{facts.name}/parity",
        model=facts.name,
        metric="parity",
        verdict=PASS if same else FAIL,
        reason_code="same_function" if same else "other_function",
        reason=f"{off} against {facts.reference}, {allowed} is allowed",
        unit="relative error",
        budget=facts.tolerance,
        candidate=worst,
        place=settings.places.get("gate.parity.tolerance", ""),
    )


def _severity(error: float) -> float:
    return math.inf if math.isnan(error) else error


# -- latency -----------------------------------------------------------------------------------------------------------

_METRICS = {BASELINE: "latency", ANCHOR: "latency_anchor"}


def _latency(subjects: Sequence[Subject], settings: Settings, collect: Callable[[Subject, int], None]) -> list[Check]:
    """All comparisons of all subjects, look by look, so that Holm's procedure sees them side by side."""
    plan = settings.plan
    open_checks = [(s, arm) for s in subjects for arm in _METRICS if arm in s.facts.arms]
    total = len(open_checks)
    last: dict[str, tuple[Subject, str, Look]] = {}
    failed: list[str] = []
    for pairs in plan.looks:
        for subject in dict.fromkeys(s for s, _ in open_checks):
            collect(subject, pairs)
        ready = {_id(s, arm): (s, arm) for s, arm in open_checks if s.count >= pairs}
        differences = {key: s.differences(arm)[:pairs] for key, (s, arm) in ready.items()}
        for key, found in sequential.look_all(differences, plan, failed=failed, total=total).items():
            last[key] = (*ready[key], found)
        failed = [key for key, (_, _, found) in last.items() if found.verdict == FAIL]
        open_checks = [(s, arm) for s, arm in ready.values() if last[_id(s, arm)][2].verdict is None]
    unsound = {s.name for s in subjects if _machine_differs(s, plan, plan.alpha / len(subjects))}
    checks = [_latency_check(s, arm, found, settings, s.name in unsound) for s, arm, found in last.values()]
    return checks + [
        _too_few(s, arm, settings)
        for s in subjects
        for arm in _METRICS
        if arm in s.facts.arms and _id(s, arm) not in last
    ]


def _id(subject: Subject, arm: str) -> str:
    return f"{subject.name}/{_METRICS[arm]}"


_FEWEST_AGAIN = 4  # fewer see next to nothing; only disturbed pairs leave so few


def _machine_differs(subject: Subject, plan: Plan, alpha: float) -> bool:
    """Whether the baseline differs from itself, for certain and by a quarter of what is allowed, half of a FAIL.

    On a quiet machine a test alone would find differences that no verdict depends on.
    """
    same = subject.machine_differences()
    if len(same) < _FEWEST_AGAIN or subject.count < 2:
        return False
    if abs(sequential.hodges_lehmann(same)) < math.log1p(plan.max_regression / 4):
        return False
    return sequential.aa_differs(same, subject.differences(BASELINE), alpha)


def _latency_check(subject: Subject, arm: str, found: Look, settings: Settings, unsound: bool) -> Check:
    verdict, code = found.verdict or INCONCLUSIVE, found.reason_code
    dropped = len(subject.facts.dropped)
    change = f"{math.expm1(found.estimate):+.1%} ({math.expm1(found.low):+.1%} to {math.expm1(found.high):+.1%})"
    allowed = f"{settings.plan.max_regression:.1%} is allowed"
    against = "the baseline" if arm == BASELINE else "the release anchor"
    if unsound:
        verdict, code = INCONCLUSIVE, "aa_differs"
        reason = "the baseline differs from itself on this machine, in pairs that hold it twice"
    elif dropped > _MOST_DROPPED * (subject.count + dropped):
        verdict, code = INCONCLUSIVE, "throttled"
        reason = f"{dropped} of {subject.count + dropped} pairs were disturbed: {subject.facts.dropped[-1]}"
    elif code == "holm":
        reason = f"{change} against {against} would fail alone, but not among so many comparisons"
    elif verdict == INCONCLUSIVE:
        reason = f"{change} against {against} decides nothing in {subject.facts.seconds:.0f} s"
    else:
        reason = f"{change} against {against}, {allowed}"
    return _compared(
        subject, arm, settings, verdict=verdict, reason_code=code, reason=reason,
        estimate=math.exp(found.estimate), low=math.exp(found.low), high=math.exp(found.high), alpha=found.alpha,
        pairs=found.n, detectable=found.detectable,
    )  # fmt: skip


_MOST_DROPPED = 0.2  # beyond it, the pairs that are left are no fair sample


def _too_few(subject: Subject, arm: str, settings: Settings) -> Check:
    """The time was up before the first look."""
    disturbed = subject.facts.dropped
    why = f"{len(disturbed)} were disturbed: {disturbed[-1]}" if disturbed else "raise the time limit"
    return _compared(
        subject, arm, settings, verdict=INCONCLUSIVE, reason_code="throttled" if disturbed else "time_limit",
        reason=f"{subject.count} pairs of sessions in {subject.facts.seconds:.0f} s, the first look needs "
        f"{settings.plan.looks[0]}; {why}", pairs=subject.count, detectable=math.inf,
    )  # fmt: skip


def _compared(subject: Subject, arm: str, settings: Settings, **fields: Any) -> Check:
    taken = subject.pairs.get(CANDIDATE, [])
    return Check(
        id=_id(subject, arm),
        model=subject.name,
        metric=_METRICS[arm],
        unit="s",
        budget=settings.plan.max_regression,
        baseline=_quartile(subject.pairs.get(arm, [])),
        candidate=_quartile(taken),
        seconds=subject.facts.seconds,
        clock=taken[0].clock if taken else "",
        place=settings.places.get("gate.max_regression", ""),
        **fields,
    )


def _quartile(taken: Sequence[Samples]) -> float | None:
    return float(np.percentile(np.concatenate([s.seconds for s in taken]), 25)) if taken else None


# -- budgets -----------------------------------------------------------------------------------------------------------


def _plain_budget(subject: Subject, key: str, settings: Settings) -> Check:
    """A budget that needs no statistics."""
    what, unit, more_is_better = BUDGETS[key]
    allowed, found = settings.budgets[key], subject.facts.measured.get(key)
    if found is None:
        raise InputError(
            f"the budget {key} cannot be checked for {subject.name}", f"its bundle does not tell the {what}",
            _HOW_TO_KNOW.get(key, "build the bundle again"),
        )  # fmt: skip
    within = found >= allowed if more_is_better else found <= allowed
    limit = f"{'at least ' if more_is_better else ''}{amount(allowed, unit)}"
    return _budget_check(
        subject, key, settings,
        verdict=PASS if within else FAIL,
        reason_code="within_budget" if within else "over_budget",
        reason=f"{what} {amount(found, unit)}, {limit} is allowed",
        candidate=found,
    )  # fmt: skip


_HOW_TO_KNOW = {
    "accuracy": "define evaluate(run) in model.py and build it again",
    "dla_fallback": "build it for the DLA, with --option dla=0, or take dla_fallback_max out of its [gate.device]",
}


def _latency_budget(subject: Subject, key: str, settings: Settings) -> Check:
    """A budget for a percentile of the candidate's latency, at the plan's confidence.

    The interval of the 99th percentile takes the calls as independent, which calls of one session are not quite.
    """
    what, unit, _ = BUDGETS[key]
    allowed, alpha = settings.budgets[key], settings.plan.alpha
    taken = subject.pairs.get(CANDIDATE, [])
    calls = np.concatenate([s.seconds for s in taken]) if taken else np.empty(0)
    common: dict[str, Any] = {
        "alpha": alpha, "pairs": len(taken), "clock": taken[0].clock if taken else "", "seconds": subject.facts.seconds
    }  # fmt: skip
    if key == "latency_p99":
        found = float(np.percentile(calls, 99)) if len(calls) else None
        needed = _calls_for_p99(settings)
        if len(calls) < needed:
            return _budget_check(
                subject, key, settings, verdict=INCONCLUSIVE, reason_code="too_few_calls", candidate=found,
                reason=f"{len(calls)} calls in {subject.facts.seconds:.0f} s cannot show a 99th percentile; "
                f"{needed} can: raise the time limit", **common,
            )  # fmt: skip
        low, high = sequential.percentile_interval(calls, 99, 1 - 2 * alpha)
    else:
        medians = np.array([s.p50 for s in taken])
        found, low, high = None, 0.0, math.inf
        if len(medians):
            found = float(np.median(medians))
            low, high = (math.exp(v) for v in sequential.signed_rank_bounds(np.log(medians), alpha))
    verdict = FAIL if low > allowed else PASS if high <= allowed else INCONCLUSIVE
    code = {PASS: "within_budget", FAIL: "over_budget", INCONCLUSIVE: "time_limit"}[verdict]
    interval = f"{amount(low, unit)} to {amount(high, unit)}"
    shown = "not measured" if found is None else f"{amount(found, unit)} ({interval})"
    return _budget_check(
        subject, key, settings, verdict=verdict, reason_code=code, candidate=found,
        reason=f"{what} {shown}, {amount(allowed, unit)} is allowed", **common,
    )  # fmt: skip


def _calls_for_p99(settings: Settings) -> int:
    return max(measure.P99_SAMPLES, sequential.calls_needed(99, 1 - settings.plan.alpha))


def _collect_calls(subject: Subject, calls: int, collect: Callable[[Subject, int], None]) -> None:
    """More pairs, until the candidate was called often enough or no more are to be had."""
    before = -1
    while sum(len(s.seconds) for s in subject.pairs.get(CANDIDATE, ())) < calls and subject.count > before:
        before = subject.count
        collect(subject, before + 1)


def _budget_check(subject: Subject, key: str, settings: Settings, **fields: Any) -> Check:
    metric = "parity_budget" if key == "parity" else key  # `parity` is the check before any timing
    return Check(
        id=f"{subject.name}/{metric}",
        model=subject.name,
        metric=metric,
        unit=BUDGETS[key][1],
        budget=settings.budgets[key],
        place=settings.places.get(f"gate.budgets.{key}", ""),
        **fields,
    )


def amount(value: float, unit: str) -> str:
    """A quantity for people, in a fitting unit."""
    return _UNITS.get(unit, lambda number: f"{number:.4g}")(value)


_UNITS: Mapping[str, Callable[[float], str]] = {"s": render_text.seconds, "bytes": render_text.size}
