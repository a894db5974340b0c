"""What a gate found, written for people and for CI: terminal, Markdown, JUnit XML, GitHub annotations, files.

Every string of a result is foreign text: names come from models that somebody else may have made. None may be able to
add a line, a table cell, an XML element or a workflow command.
"""

from __future__ import annotations  # type: ignore[assignment]  # a function below has that name

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompile import render_text
from edgecompile.files import cannot_write, write_atomic
from edgecompile.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, Check, GateResult

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite
    from rich.console import Console

SUMMARY_LIMIT = 900 << 10  # bytes; GitHub drops a summary of more than 1 MiB as a whole
ANNOTATIONS = 10  # GitHub shows no more of one kind per step
_LONGEST = 500  # characters of one foreign text, so that every line is short of any limit
_MINUS = "\N{MINUS SIGN}"
_RELATIVE = ("latency", "latency_anchor")
_TOLD_BY_NUMBERS = ("regression", "no_regression", "drift", "time_limit")
_WORST_FIRST = (ERROR, FAIL, INCONCLUSIVE, PASS)
_MARKS = {ERROR: "❌", FAIL: "❌", INCONCLUSIVE: "⚠️", PASS: "✅"}
_STYLES = {ERROR: "bold red", FAIL: "bold red", INCONCLUSIVE: "bold yellow", PASS: "bold green"}
_UNITS: Mapping[str, Callable[[float], str]] = {
    "s": render_text.seconds,
    "bytes": render_text.size,
    "relative error": render_text.error,
    "score": lambda value: f"{value:.4g}",
}

# -- in words --------------------------------------------------------------------------------------------------------


def headline(result: GateResult) -> str:
    """The verdict and how many checks are behind it, in our own words."""
    checks = result.checks
    failed, undecided = (sum(c.verdict == v for c in checks) for v in (FAIL, INCONCLUSIVE))
    of_all = f"of {render_text.plural(len(checks), 'check')}"
    match result.verdict:
        case "FAIL":
            more = f", {undecided} could not be decided" if undecided else ""
            return f"FAIL: {failed} {of_all} failed{more}"
        case "INCONCLUSIVE":
            warns = ", which counts as a warning" if result.exit_code == 0 else ""
            return f"INCONCLUSIVE: {undecided} {of_all} could not be decided{warns}"
        case "PASS":
            models = render_text.plural(len({c.model for c in checks}), "model")
            return f"PASS: {render_text.plural(len(checks), 'check')} of {models}"
        case _:
            return f"ERROR: no verdict was reached (exit code {result.exit_code})"


def sentence(check: Check) -> str:
    """What was found, what is allowed, and where undecided what could have been seen; made from the numbers alone.

    For instance ``slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed``.
    """
    relative = check.metric in _RELATIVE
    said = _compared(check) if relative else _amount(check.candidate, check.unit) or "not measured"
    if check.budget is not None:
        if relative and said.startswith("slower"):
            said += f", {100 * check.budget:.3g} % is allowed"
        elif relative:
            said += f", {100 * check.budget:.3g} % slower is allowed"
        elif check.unit == "score":
            said += f", at least {_amount(check.budget, check.unit)} is asked"
        else:
            said += f", {_amount(check.budget, check.unit)} is allowed"
    if check.reason_code == "drift":
        said += "; small, but certain"
    if check.verdict == INCONCLUSIVE and check.detectable is not None and math.isfinite(check.detectable):
        said += f"; this machine could have shown {_percent(check.detectable)} % in {_spent(check.seconds)}"
    return said


def _told(check: Check) -> tuple[str, str]:
    """What to tell of a check: in our own words, and the reason that was given where the numbers do not tell it."""
    said, reason = sentence(check), _foreign(check.reason)
    if check.metric not in _RELATIVE:
        return ("", reason) if reason else (said, "")
    return said, "" if check.estimate is not None and check.reason_code in _TOLD_BY_NUMBERS else reason


def _in_full(check: Check) -> str:
    said, reason = _told(check)
    return f"{said} ({reason})" if said and reason else said or reason


def _compared(check: Check) -> str:
    if check.estimate is None or math.isnan(check.estimate):
        return "not compared"
    change = check.estimate - 1
    text = _percent(abs(change))
    if text == "0.0":
        return f"as fast{_interval(check)}"
    if change > 0:
        return f"slower by {text} %{_interval(check)}"
    return f"faster by {text} %{_interval(check, flip=True)}"


def _interval(check: Check, flip: bool = False, signed: bool = False) -> str:
    """The bounds of the change in brackets; with ``flip`` those of the gain in speed."""
    if check.low is None or check.high is None:
        return ""
    bounds = (1 - check.high, 1 - check.low) if flip else (check.low - 1, check.high - 1)
    low, high = (_percent(b, signed) for b in bounds)
    return f" ({low} to {high} %)"


def _percent(fraction: float, signed: bool = False) -> str:
    """A fraction in percent, without the sign for percent."""
    if not math.isfinite(fraction):
        return "?" if math.isnan(fraction) else "∞" if fraction > 0 else f"{_MINUS}∞"
    text = f"{100 * fraction:{'+' if signed else ''}.{0 if abs(fraction) >= 1 else 1}f}"
    return "0.0" if float(text) == 0 else text.replace("-", _MINUS)


def _amount(value: float | None, unit: str) -> str:
    """A measured or allowed value with its unit; empty if unknown."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return render_text.error(value)
    return _UNITS.get(unit, lambda v: f"{v:.4g}")(value)


def _spent(seconds: float) -> str:
    return f"{seconds:.0f} s" if 9.95 <= seconds < 100 else _amount(seconds, "s")


def _change(check: Check) -> str:
    """The change for a table: ``+5.3 % (+4.1 to +6.6 %)``."""
    if check.estimate is None:
        return ""
    return f"{_percent(check.estimate - 1, signed=True)} %{_interval(check, signed=True)}"


def _limit(check: Check) -> str:
    """What is allowed, for a table."""
    if check.budget is None:
        return ""
    if check.metric in _RELATIVE:
        return f"+{100 * check.budget:.3g} %"
    return f"{'≥ ' if check.unit == 'score' else ''}{_amount(check.budget, check.unit)}"


def _took(result: GateResult, quoted: Callable[[str], str]) -> str:
    """How long it took and on what machine; empty where nothing was measured."""
    known = result.fingerprint.get("class") or ", ".join(f"{k} {v}" for k, v in _facts(result.fingerprint) if v)
    machine = f" on {quoted(_foreign(known))}" if known else ""
    return f"Took {_spent(result.seconds)}{machine}." if result.seconds or known else ""


def _foreign(text: str) -> str:
    """Foreign text on one line, without control characters and of bounded length."""
    return render_text.shorten(render_text.clean(str(text)), _LONGEST)


def _facts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A mapping, nested or not, as dotted keys and texts."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", " ".join(map(str, value))
        else:
            yield f"{prefix}{key}", str(value)


def _by_model(checks: Iterable[Check]) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(check.model, []).append(check)
    return found


def _badness(check: Check) -> tuple[int, bool, float]:
    """Sorts the worst first: failures, a wrong model before all others, then by how far the limit is exceeded."""
    excess = 0.0
    if check.budget and check.metric in _RELATIVE and check.estimate is not None:
        excess = (check.estimate - 1) / check.budget
    elif check.budget and check.candidate:
        excess = check.budget / check.candidate if check.unit == "score" else check.candidate / check.budget
    excess = 0.0 if math.isnan(excess) else excess
    return _WORST_FIRST.index(check.verdict), check.metric != "parity", -excess


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(result: GateResult, limit: int = SUMMARY_LIMIT) -> str:
    """The result for a job summary (GitHub-flavoured Markdown), the worst model first.

    Args:
        result: what was found.
        limit: most bytes; what does not fit is left out, and a note at the end says so.
    """
    lines = list(_markdown(result))
    note = f"\n*The rest is left out: there is room for {render_text.size(limit)}. It is in* `result.json`.\n"
    sizes = [len(line.encode()) + 1 for line in lines]
    if sum(sizes) <= limit:
        return "\n".join(lines) + "\n"
    room, kept = limit - len(note.encode()), 0
    while kept < len(lines) and sizes[kept] <= room:
        room -= sizes[kept]
        kept += 1
    return "\n".join(lines[:kept]) + "\n" + note if kept else ""


def _markdown(result: GateResult) -> Iterator[str]:
    code = render_text.code
    yield f"## {_MARKS[result.verdict]} {headline(result)}"
    if spent := _took(result, code):
        yield ""
        yield spent
    if result.error:
        yield ""
        for name in ("what", "why", "fix"):
            if text := _foreign(getattr(result.error, name)):
                yield f"- {name}: {code(text)}"
    models = _by_model(result.checks)
    for model in sorted(models, key=lambda name: min(map(_badness, models[name]))):
        yield from _markdown_model(model, models[model])
    if result.notes:
        yield ""
        yield "### Notes"
        yield ""
        yield from (f"- {code(_foreign(note))}" for note in result.notes)


def _markdown_model(model: str, checks: list[Check]) -> Iterator[str]:
    code = render_text.code
    yield ""
    yield f"### {code(_foreign(model))}"
    yield ""
    yield "| check | baseline | candidate | change | allowed | verdict |"
    yield "|:--|--:|--:|--:|--:|:--|"
    for check in checks:
        yield (
            f"| {render_text.cell(_foreign(check.metric))} | {_amount(check.baseline, check.unit)} "
            f"| {_amount(check.candidate, check.unit)} | {_change(check)} | {_limit(check)} "
            f"| {_MARKS[check.verdict]} {check.verdict} |"
        )
    notable = [c for c in checks if c.verdict != PASS or c.reason_code == "drift"]
    if notable:
        yield ""
    for check in sorted(notable, key=_badness):
        said, reason = _told(check)
        why = f"{said} ({code(reason)})" if said and reason else said or code(reason)
        yield f"- {_MARKS[check.verdict]} {code(_foreign(check.metric))}: {why}"


# -- annotations -----------------------------------------------------------------------------------------------------


def annotations(result: GateResult, limit: int = ANNOTATIONS) -> list[str]:
    """GitHub workflow commands for everything that did not pass, the worst first; each is one line to print.

    Args:
        result: what was found.
        limit: most commands, at least 1; the last says how many are left out.
    """
    found = []
    if result.error:
        parts = (result.error.what, result.error.why, result.error.fix and f"fix: {result.error.fix}")
        found.append(_command("error", "", "edgecompile gate", "; ".join(_foreign(p) for p in parts if p)))
    for check in sorted((c for c in result.checks if c.verdict != PASS), key=_badness):
        kind = "error" if check.verdict == FAIL else "warning"
        found.append(_command(kind, check.place, f"{check.model} {check.metric}: {check.verdict}", _in_full(check)))
    if len(found) > limit:
        left_out = found[limit - 1 :]
        kind = "error" if left_out[0].startswith("::error") else "warning"
        more = f"{len(left_out)} more did not pass: they are in result.json"
        found[limit - 1 :] = [_command(kind, "", "edgecompile gate", more)]
    return found


def _command(kind: str, place: str, title: str, message: str) -> str:
    """A workflow command; ``place`` is ``file:line``, or empty."""
    file, _, line = place.rpartition(":")
    properties = {"file": file, "line": line} if file and line.isdecimal() else {}
    given = ",".join(f"{k}={_escaped(_foreign(v), ':,')}" for k, v in {**properties, "title": title}.items())
    return f"::{kind} {given}::{_escaped(_foreign(message))}"


def _escaped(text: str, more: str = "") -> str:
    """``text`` with what would end a workflow command, or one of its properties, as percent codes."""
    return "".join(f"%{ord(c):02X}" if c in f"%\r\n{more}" else c for c in text)


# -- JUnit XML -------------------------------------------------------------------------------------------------------


def junit(result: GateResult) -> str:
    """The result as JUnit XML: a suite per model, a case per check; undecided ones are skipped.

    A run without a verdict has one more suite, whose only case is an error. The document keeps to ``junit-10.xsd`` of
    Jenkins' xunit plugin, the strictest description in common use; all times are in seconds.
    """
    from junitparser import Error, JUnitXml, TestCase

    suites = [_suite(result, model, map(_case, checks)) for model, checks in _by_model(result.checks).items()]
    if result.error:
        error = Error(_foreign(result.error.what), f"exit code {result.exit_code}")
        error.text = "\n".join(filter(None, (_foreign(result.error.why), _foreign(result.error.fix))))
        case = TestCase("gate", "edgecompile", round(result.seconds, 3))
        case.result = error
        suites.append(_suite(result, "edgecompile gate", [case]))
    made = JUnitXml("edgecompile gate")
    # Appended rather than added, which would merge two models of one name; and no statistics of its own, since that
    # schema knows no count of skipped cases at the root.
    made.extend(suites)
    for name in ("tests", "failures", "errors", "time"):
        setattr(made, name, sum(getattr(suite, name) for suite in suites))
    buffer = io.BytesIO()
    made.write(buffer)
    return buffer.getvalue().decode() + "\n"


def _suite(result: GateResult, model: str, cases: Iterable[TestCase]) -> TestSuite:
    from junitparser import TestSuite

    suite = TestSuite(_foreign(model))
    if result.started:
        suite.timestamp = _foreign(result.started)[:19]  # the schema's dates are without a zone; ours are UTC
    facts = {
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "command": result.command,
        "config_digest": result.config_digest,
        "version": result.versions,
        "fingerprint": result.fingerprint,
        "artefact": {
            a.role: {"path": a.path, "digest": a.digest, "bytes": a.bytes} for a in result.artefacts if a.model == model
        },
    }
    for key, value in _facts(facts):
        suite.add_property(_foreign(key), _foreign(value))
    suite.add_testcases(list(cases))
    return suite


def _case(check: Check) -> TestCase:
    from junitparser import Failure, Skipped, TestCase

    case = TestCase(_foreign(check.id), _foreign(check.model), round(check.seconds, 3))
    if check.verdict == PASS:
        case.system_out = _in_full(check)
        return case
    found = (Failure if check.verdict == FAIL else Skipped)(_in_full(check), _foreign(check.reason_code))
    found.text = sentence(check)
    case.result = found
    return case


# -- terminal --------------------------------------------------------------------------------------------------------


def print_result(result: GateResult, console: Console) -> None:
    """Print the verdict, then for each model what was found; readable without colours."""
    screen = render_text.Screen(console)
    word, _, rest = headline(result).partition(":")
    screen.say((f"{word}:", _STYLES[result.verdict]), (rest, ""))
    if result.error:
        for name in ("what", "why", "fix"):
            if text := getattr(result.error, name):
                screen.say((f"  {name}: {_inert(text)}", ""))
    for model, checks in _by_model(result.checks).items():
        rows = [
            (
                check.verdict, _inert(check.metric), _inert(_in_full(check)),
                _amount(check.baseline, check.unit), _amount(check.candidate, check.unit),
            )
            for check in checks
        ]  # fmt: skip
        screen.table(_inert(model), ("verdict", "check", "found", "baseline", "candidate"), rows, left=3)
    closing = [*(f"note: {_inert(note)}" for note in result.notes), _took(result, _inert)]
    if any(closing):
        screen.say(("", ""))
    for line in filter(None, closing):
        screen.say((line, ""))


def _inert(text: str) -> str:
    """Foreign text that a CI runner, which reads the log, takes for no command: ``::name::`` or ``##name[``."""
    return _foreign(text).replace("::", r":\x3a").replace("##", r"#\x23")


# -- files -----------------------------------------------------------------------------------------------------------


def write(result: GateResult, folder: Path) -> None:
    """Write ``result.json``, ``junit.xml`` and ``summary.md``, each whole or not at all; a missing folder is made.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    text = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / "result.json", [text.encode()])
    write_junit(result, folder / "junit.xml")
    write_atomic(folder / "summary.md", [markdown(result).encode()])


def write_junit(result: GateResult, path: Path) -> None:
    """Write the JUnit XML, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    write_atomic(path, [junit(result).encode()])


def append_summary(result: GateResult, path: Path) -> None:
    """Append the Markdown to a file, such as the one that ``GITHUB_STEP_SUMMARY`` names.

    What the file holds already counts towards :data:`SUMMARY_LIMIT`.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with open(path, "ab") as file:
            file.write(markdown(result, SUMMARY_LIMIT - os.fstat(file.fileno()).st_size).encode())
    except OSError as error:
        raise cannot_write(path, error) from None
