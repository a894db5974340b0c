"""One run of the gate: bundles in, a verdict and its recording out.

The baseline is an artefact, not a number: both engines are measured side by side. What was measured is kept whole, in
``samples.npz``, and :func:`replay` computes the same result from it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecompile import __version__, documents, history, judge, measure, oracle, registry
from edgecompile.bundle import MANIFEST, MODEL, Bundle, file_digest
from edgecompile.config import GateConfig
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.judge import ANCHOR, BASELINE, CANDIDATE, Facts, Settings, Subject
from edgecompile.sequential import Plan
from edgecompile.verdict import ERROR, INCONCLUSIVE, Artefact, Check, GateResult, Problem, overall

SAMPLES = "samples.npz"


@dataclass(frozen=True)
class Contest:
    """A candidate and what it is compared with.

    Attributes:
        name: of the candidate, unique within the run.
        candidate: its bundle.
        baseline, anchor: other bundles of the same model, or None.
    """

    name: str
    candidate: Bundle
    baseline: Bundle | None = None
    anchor: Bundle | None = None

    @property
    def arms(self) -> dict[str, Bundle]:
        """The bundles that take part, by arm."""
        found = {CANDIDATE: self.candidate, BASELINE: self.baseline, ANCHOR: self.anchor}
        return {arm: bundle for arm, bundle in found.items() if bundle is not None}


@dataclass(frozen=True)
class Header:
    """What a result says besides its checks; see :class:`edgecompile.verdict.GateResult`."""

    artefacts: tuple[Artefact, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    config_digest: str = ""
    started: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warn: bool = False


@dataclass
class Recording:
    """Everything that a verdict follows from."""

    settings: Settings
    subjects: list[Subject]
    header: Header

    def result(self, checks: Sequence[Check] | None = None) -> GateResult:
        """The verdict; ``checks`` where :func:`edgecompile.judge.judge` has just given them."""
        made = judge.judge(self.subjects, self.settings) if checks is None else list(checks)
        verdict, code = overall([c.verdict for c in made])
        shown = {f: getattr(self.header, f) for f in Header.__dataclass_fields__ if f != "warn"}
        settings = {"plan": documents.encode(self.settings.plan, {}), "budgets": dict(self.settings.budgets)}
        code = 0 if verdict == INCONCLUSIVE and self.header.warn else code
        return GateResult(verdict, code, tuple(made), settings=settings, **shown)

    def failure(self, error: Problem, code: int) -> GateResult:
        """What is known when there is no verdict."""
        return replace(self.result([]), verdict=ERROR, exit_code=code, error=error)

    def save(self, path: Path) -> None:
        """Write the recording, see :func:`edgecompile.measure.save`.

        Raises:
            InputError: it cannot be written.
        """
        samples = {
            f"{number}/{kind}/{arm}": measure.joined(taken)
            for number, subject in enumerate(self.subjects)
            for kind, arms in (("pairs", subject.pairs), ("again", subject.again))
            for arm, taken in arms.items()
        }
        described = (self.settings, self.header, tuple(s.facts for s in self.subjects))
        measure.save(path, samples, recording=[documents.encode(part, {}) for part in described])

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: it is something else.
        """
        samples, facts = measure.load(path)
        try:
            settings, header, described = facts["recording"]
            subjects = [Subject(documents.decode(Facts, f, "subject", {})) for f in described]
            for name, taken in samples.items():
                number, kind, arm = name.split("/")
                getattr(subjects[int(number)], kind)[arm] = measure.by_session(taken)
            return cls(
                documents.decode(Settings, settings, "settings", {}), subjects,
                documents.decode(Header, header, "header", {}),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{path} is no recording of a gate", str(error), "give the -o folder of a run") from None


def replay(folder: Path) -> GateResult:
    """The result of a run again, from its recording; ``folder`` holds ``samples.npz``, or is that file.

    Raises:
        InputError: there is no recording, or it is damaged.
    """
    return Recording.load(folder / SAMPLES if folder.is_dir() else folder).result()


def run(
    contests: Sequence[Contest],
    config: GateConfig,
    board: Any,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    keep: Callable[[Recording], None] | None = None,
) -> GateResult:
    """Judge candidates on a board.

    Args:
        contests: the candidates.
        config: the limits, as the file gives them; a class of devices is chosen here.
        board: an open board, see :func:`edgecompile.remote.open_board`.
        seed: of the order of sessions and blocks.
        progress: called with what is being done.
        keep: called with the recording when it is complete, and also when the run is interrupted.

    Raises:
        EnvironmentMissing: the board cannot run an engine, no class of devices fits it, or its clocks are not fixed.
        InputError: a budget cannot be checked.
    """
    say = progress or (lambda _: None)
    start, started = time.perf_counter(), datetime.datetime.now(datetime.timezone.utc)
    keys = {c.name: {arm: board.add(bundle.path) for arm, bundle in c.arms.items()} for c in contests}
    engines = [c.candidate.manifest["engine"] for c in contests]
    versions = {name: v for engine in engines for name, v in engine["versions"].items()}
    place = board.fingerprint(versions, engines[0]["options"])
    config = _on_device(config, place)
    notes = _require_locked(config, board)
    attempts = config.retries + 1
    plan = Plan(config.max_regression, config.alpha / attempts, time_limit=config.time_limit)
    recording = Recording(
        Settings(plan, config.budgets, config.places),
        [],
        Header(
            artefacts=tuple(_artefact(c, arm, bundle) for c in contests for arm, bundle in c.arms.items()),
            fingerprint=place.to_json(),
            command=shlex.join(["edgecompile", *sys.argv[1:]]),
            config_digest=config.digest,
            started=started.isoformat(timespec="seconds"),
            versions={"edgecompile": __version__, **versions},
            notes=notes,
            warn=config.on_inconclusive == "warn",
        ),
    )
    try:
        for contest in contests:
            say(f"checking parity of {contest.name}")
            recording.subjects.append(Subject(_facts(contest, config, board, keys[contest.name])))
        checks: list[Check] = []
        for attempt in range(attempts):
            again = recording.subjects if not attempt else _undecided(recording.subjects, checks)
            for subject in again:
                subject.pairs, subject.again = {}, {}
                subject.facts = replace(subject.facts, seconds=0.0, dropped=())
            recorders = {s.name: judge.Recorder(s, _session(board, keys[s.name]), plan, seed + attempt) for s in again}

            def record(subject: Subject, count: int, recorders: Mapping[str, judge.Recorder] = recorders) -> None:
                if subject.name in recorders:
                    say(f"{subject.name}: {subject.count} pairs, {subject.facts.seconds:.0f} s")
                    recorders[subject.name](count)

            checks = judge.judge(recording.subjects, recording.settings, record)
            if not _undecided(recording.subjects, checks):
                break
    finally:
        recording.header = replace(recording.header, seconds=round(time.perf_counter() - start, 3))
        if keep is not None:
            keep(recording)
    return recording.result(checks)


def contests(
    candidates: Sequence[Bundle], baseline: Callable[[str], Bundle | None], anchor: Callable[[str], Bundle | None]
) -> list[Contest]:
    """Name the candidates and find what each is compared with.

    Args:
        candidates: bundles.
        baseline, anchor: model name -> the bundle to compare with, or None.

    Raises:
        InputError: two candidates are the same bundle.
    """
    found: dict[str, Contest] = {}
    for candidate in candidates:
        model = str(candidate.manifest["name"])
        twins = sum(str(c.manifest["name"]) == model for c in candidates)
        name = model if twins == 1 else f"{model} ({candidate.path})"
        if name in found:
            raise InputError(f"{candidate.path} is given twice", fix="give each candidate once")
        found[name] = Contest(name, candidate, baseline(model), anchor(model))
    return list(found.values())


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Treat SIGTERM, with which a CI system ends a job, like Ctrl-C: what was measured is written first."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_device(config: GateConfig, place: Any) -> GateConfig:
    chosen = config.for_device(place)
    if config.devices and chosen.device is None:
        raise EnvironmentMissing(
            f"no [gate.device] of the configuration fits this machine, {place.class_name}",
            f"there are {', '.join(d.name for d in config.devices)}; stored numbers count only where they were made",
            f'add a table with match = "{place.class_name}"',
        )
    device = chosen.device
    if device is None or device.dla_fallback_max is None:
        return chosen
    place_of = chosen.places.get(f"gate.device.{device.name}.dla_fallback_max", "")
    return replace(
        chosen,
        budgets={**chosen.budgets, "dla_fallback": float(device.dla_fallback_max)},
        places={**chosen.places, "gate.budgets.dla_fallback": place_of},
    )


def _require_locked(config: GateConfig, board: Any) -> tuple[str, ...]:
    """Refuse a board whose power mode or clocks are not those of its class; flag one whose class says nothing."""
    device = config.device
    if device is None or (device.nvpmodel is None and device.jetson_clocks is None):
        return board.require_locked(None, refuse=False)
    return board.require_locked(device.nvpmodel, bool(device.jetson_clocks))


def _undecided(subjects: Sequence[Subject], checks: Sequence[Check]) -> list[Subject]:
    open_models = {c.model for c in checks if c.verdict == INCONCLUSIVE}
    return [s for s in subjects if s.name in open_models]


def _session(board: Any, keys: Mapping[str, str]) -> judge.Session:
    """Opens the engines of one contest and lets them take turns."""

    def session(arms: Mapping[str, str], seed: int) -> tuple[dict[str, measure.Samples], str]:
        return board.pair({label: keys[arm] for label, arm in arms.items()}, seconds=judge.PAIR_SECONDS, seed=seed)

    return session


def _facts(contest: Contest, config: GateConfig, board: Any, keys: Mapping[str, str]) -> Facts:
    """Parity and everything that is known without timing."""
    from edgecompile.driver import TOLERANCE

    judged_by = contest.baseline if config.parity.against == "baseline" and contest.baseline else contest.candidate
    feeds, reference = judged_by.probe()
    tolerance = config.parity.tolerance
    if tolerance is None:
        made = contest.candidate
        rounded = registry.target(made.manifest["target"]).approximates(made.graph(), made.engine_manifest.options)
        tolerance = TOLERANCE["int8" if rounded else str(made.manifest["precision"])]
    errors = oracle.compare_all(reference, board.outputs(keys[CANDIDATE], feeds))
    measured = _measured(contest.candidate) if config.budgets else {}
    measured |= _dla_fallback(contest.candidate)
    if "peak_memory" in config.budgets:
        measured["peak_memory"] = float(board.peak_memory(keys[CANDIDATE]))
    return Facts(
        name=contest.name,
        parity={name: float(e.max_rel) for name, e in errors.items()},
        reference="the model of the baseline" if judged_by is contest.baseline else "its own source",
        tolerance=tolerance,
        measured=measured,
        arms=tuple(contest.arms),
    )


def _measured(bundle: Bundle) -> dict[str, float]:
    """What the bundle itself tells of the quantities that have budgets."""
    from edgecompile.report import Report

    report = Report.from_json(json.loads((bundle.path / "report.json").read_text()))
    seconds = {k: v for k, v in report.provenance.seconds.items() if k not in ("measure", "evaluate")}
    measured = {
        "engine_size": float(_engine_size(bundle)),
        "build_time": sum(seconds.values()),
        "parity": max((e.max_rel for e in report.parity.outputs.values()), default=0.0),
    }
    return measured | ({"accuracy": report.accuracy.engine} if report.accuracy else {})


def _dla_fallback(bundle: Bundle) -> dict[str, float]:
    """How many layers the GPU runs because the DLA cannot, where that is known."""
    dla = bundle.manifest["engine"]["options"].get("_dla")
    try:
        return {} if dla is None else {"dla_fallback": float(dla["layers"] - dla["taken"])}
    except (KeyError, TypeError) as error:
        raise InputError(f"{bundle.path} does not tell what its DLA runs", f"{error!r}", "build it again") from None


def _engine_size(bundle: Bundle) -> int:
    files = bundle.manifest["engine"]["files"] or [MODEL]
    return sum(int(bundle.manifest["files"][name]["bytes"]) for name in files)


def _artefact(contest: Contest, arm: str, bundle: Bundle) -> Artefact:
    return Artefact(arm, contest.name, str(bundle.path), file_digest(bundle.path / MANIFEST), _engine_size(bundle))


def remember(result: GateResult, path: Path) -> None:
    """Append a line per candidate to a history.

    Raises:
        InputError: it cannot be written.
    """
    for artefact in result.artefacts:
        if artefact.role != CANDIDATE:
            continue
        checks = [c for c in result.checks if c.model == artefact.model]
        manifest = Bundle.open(artefact.path).manifest
        change = next((c for c in checks if c.metric == "latency" and c.estimate is not None), None)
        values = {c.metric: c.candidate for c in checks if c.candidate is not None and math.isfinite(c.candidate)}
        intervals = {}
        if change is not None and change.estimate is not None and change.low is not None and change.high is not None:
            values["change"] = change.estimate
            intervals = {"change": (change.low, change.high)} if math.isfinite(change.high - change.low) else {}
        entry = history.Entry.now(
            "gate", artefact.model, str(manifest["target"]), str(manifest["precision"]), values,
            intervals=intervals, fingerprint=str(result.fingerprint.get("key", "")), digest=artefact.digest,
            verdict=overall([c.verdict for c in checks])[0],
        )  # fmt: skip
        history.append(entry, path)
