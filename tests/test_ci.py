"""What CI and people are given: words, Markdown, JUnit XML, annotations, files, and the examples to copy."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shlex
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from edgecompile import ci, cli, config, render_text, verdict
from edgecompile.errors import InputError
from edgecompile.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, Artefact, Check, GateResult, Problem

COMPARED: dict[str, Any] = {
    "unit": "s", "budget": 0.05, "baseline": 8.12e-3, "candidate": 8.55e-3, "estimate": 1.053, "low": 1.041,
    "high": 1.066, "alpha": 0.002, "pairs": 20, "seconds": 31.2, "clock": "thread_cpu", "place": "edgecompile.toml:3",
}  # fmt: skip


def compared(outcome: str, code: str, model: str = "net", **changed: Any) -> Check:
    fields = COMPARED | {"metric": "latency", "reason": "18 of 20 pairs say so"} | changed
    return Check(f"{model}/{fields['metric']}", model, verdict=outcome, reason_code=code, **fields)


def budget(outcome: str, metric: str, allowed: float, found: float | None, unit: str, reason: str = "", **kw: Any):
    code = {PASS: "within_budget", FAIL: "over_budget", INCONCLUSIVE: "too_few_calls"}[outcome]
    return Check(f"net/{metric}", "net", metric, outcome, code, reason, unit, allowed, None, found, **kw)


PARITY = Check("net/parity", "net", "parity", PASS, "same_function", "output y is off by 3e-06", "relative error", 1e-4,
               None, 3e-6)  # fmt: skip
SLOWER = compared(FAIL, "regression")
UNDECIDED = compared(
    INCONCLUSIVE, "aa_differs", "other", low=0.991, estimate=1.02, detectable=0.078, seconds=60.0,
    reason="the baseline differs from itself",
)  # fmt: skip
DRIFTS = compared(PASS, "drift", "third", estimate=1.02, low=1.012, high=1.028, reason="slower for certain")
SMALL = budget(PASS, "engine_size", 30 << 20, 24 << 20, "bytes", "engine size 24.0 MiB, 30.0 MiB is allowed")


def result(*checks: Check, **changed: Any) -> GateResult:
    outcome, code = verdict.overall([c.verdict for c in checks]) if checks else (ERROR, 4)
    fields: dict[str, Any] = {
        "checks": checks,
        "artefacts": (Artefact("candidate", "net", "build/net", "0a" * 32, 1234),
                      Artefact("baseline", "net", "main", "0b" * 32, 1234)),
        "fingerprint": {"cpu": "EPYC 7B13", "cores": 2, "gpu": {"name": ""}, "flags": ["avx", "fma"]},
        "command": "edgecompile gate build/net",
        "started": "2025-03-14T09:26:53+00:00",
        "seconds": 91.4,
        "versions": {"edgecompile": "0.1.0"},
        "error": None if checks else Problem("there is no baseline main", "the store is empty", "save one"),
    }  # fmt: skip
    return GateResult(outcome, code, **fields | changed)


MIXED = result(PARITY, SMALL, DRIFTS, UNDECIDED, SLOWER, notes=("the machine was busy",))
BROKEN = result()
RESULTS = {
    "pass": result(PARITY, SMALL),
    "drift": result(PARITY, DRIFTS),
    "undecided": result(PARITY, UNDECIDED),
    "warning": dataclasses.replace(result(UNDECIDED), exit_code=0),
    "mixed": MIXED,
    "error": BROKEN,
    "interrupted": dataclasses.replace(BROKEN, exit_code=130, checks=(PARITY, SLOWER)),
    "defect": dataclasses.replace(BROKEN, exit_code=70, fingerprint={}, versions={}, artefacts=(), started=""),
}
every_result = pytest.mark.parametrize("made", RESULTS.values(), ids=list(RESULTS))


@every_result
def test_the_results_tested_here_are_valid(made: GateResult):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(verdict.schema()).validate(made.to_json())


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (SLOWER, "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed"),
        (UNDECIDED, "slower by 2.0 % (−0.9 to 6.6 %), 5 % is allowed; this machine could have shown 7.8 % in 60 s"),
        (DRIFTS, "slower by 2.0 % (1.2 to 2.8 %), 5 % is allowed; small, but certain"),
        (dataclasses.replace(UNDECIDED, detectable=math.inf), "slower by 2.0 % (−0.9 to 6.6 %), 5 % is allowed"),
        (compared(PASS, "no_regression", estimate=0.968, low=0.957, high=0.979),
         "faster by 3.2 % (2.1 to 4.3 %), 5 % slower is allowed"),
        (compared(PASS, "no_regression", estimate=1.0002, low=0.996, high=1.005, budget=0.025),
         "as fast (−0.4 to 0.5 %), 2.5 % slower is allowed"),
        (compared(FAIL, "regression", estimate=3.5, low=2.2, high=math.inf),
         "slower by 250 % (120 to ∞ %), 5 % is allowed"),
        (compared(INCONCLUSIVE, "aa_differs", estimate=None, low=None, high=None),
         "not compared, 5 % slower is allowed"),
        (compared(FAIL, "regression", metric="latency_anchor"), "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed"),
        (SMALL, "24.0 MiB, 30.0 MiB is allowed"),
        (PARITY, "3e-6, 1e-4 is allowed"),
        (dataclasses.replace(PARITY, verdict=FAIL, candidate=math.nan), "not a number, 1e-4 is allowed"),
        (budget(FAIL, "latency_p50", 4e-3, 4.4e-3, "s"), "4.40 ms, 4.00 ms is allowed"),
        (budget(FAIL, "accuracy", 0.761, 0.7504, "score"), "0.7504, at least 0.761 is asked"),
        (budget(INCONCLUSIVE, "latency_p99", 9e-3, None, "s"), "not measured, 9.00 ms is allowed"),
    ],
)  # fmt: skip
def test_a_check_in_a_sentence(check: Check, text: str):
    assert ci.sentence(check) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [("pass", "PASS: 2 checks of 1 model"), ("drift", "PASS: 2 checks of 2 models"),
     ("undecided", "INCONCLUSIVE: 1 of 2 checks could not be decided"),
     ("warning", "INCONCLUSIVE: 1 of 1 check could not be decided, which counts as a warning"),
     ("mixed", "FAIL: 1 of 5 checks failed, 1 could not be decided"),
     ("interrupted", "ERROR: no verdict was reached (exit code 130)")],
)  # fmt: skip
def test_the_headline(name: str, text: str):
    assert ci.headline(RESULTS[name]) == text


# -- Markdown --------------------------------------------------------------------------------------------------------


def _tokens(text: str) -> tuple[list[str], list[str], list[str]]:
    """Kinds of all blocks and their parts, the words outside code, the code."""
    kinds, words, code = [], [], []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        kinds.append(token.type)
        for child in token.children or ():
            kinds.append(child.type)
            (code if child.type == "code_inline" else words).append(child.content)
    return kinds, words, code


def _cells(text: str) -> set[int]:
    return {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}


@every_result
def test_markdown_says_the_verdict_first_and_has_whole_tables(made: GateResult):
    text = ci.markdown(made)
    assert text.splitlines()[0].endswith(ci.headline(made))
    kinds, _, code = _tokens(text)
    assert kinds.count("table_open") == len({c.model for c in made.checks})
    assert kinds.count("tr_open") == len(made.checks) + kinds.count("table_open")
    assert _cells(text) in ({7}, set())
    if made.error:
        assert {made.error.what, made.error.why, made.error.fix} <= set(code)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (SLOWER, "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed"),
        (dataclasses.replace(SLOWER, verdict=INCONCLUSIVE, reason_code="holm"),
         "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed (18 of 20 pairs say so)"),
        (compared(INCONCLUSIVE, "time_limit", estimate=None, reason="8 pairs, 10 are needed"),
         "not compared, 5 % slower is allowed (8 pairs, 10 are needed)"),
        (PARITY, "output y is off by 3e-06"),
        (budget(FAIL, "latency_p50", 4e-3, 4.4e-3, "s"), "4.40 ms, 4.00 ms is allowed"),
    ],
)  # fmt: skip
def test_a_reason_is_told_where_the_numbers_do_not_tell_it(check: Check, text: str):
    found = ET.fromstring(ci.junit(result(check)))[0][-1][0]
    assert (found.get("message") or found.text) == text


def test_the_machine_is_named_by_its_class_where_it_has_one():
    made = dataclasses.replace(MIXED, fingerprint={"class": "amd-epyc/2-cores", "hard": {"cpu": "EPYC"}})
    assert "\nTook 91 s on `amd-epyc/2-cores`.\n" in ci.markdown(made)
    assert "\nTook 91 s on amd-epyc/2-cores.\n" in _printed(made)
    assert "Took" not in ci.markdown(dataclasses.replace(RESULTS["defect"], seconds=0.0))


def test_markdown_tells_the_facts():
    text = ci.markdown(MIXED)
    for fact in (
        "Took 91 s on `cpu EPYC 7B13, cores 2, flags avx fma`.",
        "| `latency` | 8.12 ms | 8.55 ms | +5.3 % (+4.1 to +6.6 %) | +5 % | ❌ FAIL |",
        "| `engine_size` |  | 24.0 MiB |  | 30.0 MiB | ✅ PASS |",
        "- ❌ `latency`: slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed\n",
        "5 % is allowed; this machine could have shown 7.8 % in 60 s (`the baseline differs from itself`)\n",
        "- ✅ `latency`: slower by 2.0 % (1.2 to 2.8 %), 5 % is allowed; small, but certain\n",
        "- `the machine was busy`",
    ):
        assert fact in text
    headings = re.findall(r"^### (.*)$", text, re.M)
    assert headings == ["`net`", "`other`", "`third`", "Notes"]  # the worst model first
    assert "\n- " not in ci.markdown(RESULTS["pass"])  # nothing to explain


@pytest.mark.parametrize("limit", [0, 100, 400, 1000, 2000])
def test_markdown_is_cut_between_lines_and_says_so(limit: int):
    whole = ci.markdown(MIXED)
    text = ci.markdown(MIXED, limit)
    assert len(text.encode()) <= limit
    if len(whole.encode()) <= limit:
        assert text == whole
    elif text:
        kept, _, note = text.rstrip().rpartition("\n\n")
        assert "is left out" in note
        assert whole.startswith(kept + "\n")


def test_markdown_stays_below_the_cap_of_a_job_summary():
    many = tuple(compared(PASS, "no_regression", f"model {i} {'é' * 300}") for i in range(3000))
    text = ci.markdown(result(*many, SLOWER))
    assert 800 << 10 < len(text.encode()) <= ci.SUMMARY_LIMIT == 900 << 10
    assert text.index("### `net`") < 300  # what failed is not what is cut off
    assert "is left out: there is room for 900 KiB" in text[-200:]
    assert _cells(text) == {7}


# -- annotations -----------------------------------------------------------------------------------------------------


def _command(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as a runner reads it."""
    assert line.startswith("::")
    head, end, message = line[2:].partition("::")
    assert end
    kind, _, properties = head.partition(" ")
    found = dict(p.split("=", 1) for p in properties.split(","))
    for code in ("3A", "2C", "0D", "0A", "25"):
        found = {k: v.replace(f"%{code}", chr(int(code, 16))) for k, v in found.items()}
        if code not in ("3A", "2C"):
            message = message.replace(f"%{code}", chr(int(code, 16)))
    return kind, found, message


def test_annotations_point_at_the_limit_worst_first():
    wrong = dataclasses.replace(PARITY, verdict=FAIL, reason_code="other_function", place="")
    slowest = compared(FAIL, "regression", "slow", estimate=1.4)
    found = [_command(a) for a in ci.annotations(result(UNDECIDED, DRIFTS, SLOWER, slowest, wrong, SMALL))]
    assert [(kind, props["title"]) for kind, props, _ in found] == [
        ("error", "net parity: FAIL"), ("error", "slow latency: FAIL"), ("error", "net latency: FAIL"),
        ("warning", "other latency: INCONCLUSIVE"),
    ]  # fmt: skip
    assert found[2][1] == {"file": "edgecompile.toml", "line": "3", "title": "net latency: FAIL"}
    assert found[2][2] == "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed"
    assert set(found[0][1]) == {"title"}
    assert ci.annotations(RESULTS["drift"]) == []


def test_an_error_is_annotated_with_its_fix():
    assert ci.annotations(BROKEN) == [
        "::error title=edgecompile gate::there is no baseline main; the store is empty; fix: save one"
    ]


@pytest.mark.parametrize(("failures", "limit", "shown"), [(10, 10, 10), (11, 10, 10), (5, 3, 3), (2, 1, 1), (0, 10, 0)])
def test_annotations_are_few_and_the_last_counts_the_rest(failures: int, limit: int, shown: int):
    checks = [compared(FAIL, "regression", f"m{i}", estimate=1.1 + i / 100) for i in range(failures)]
    found = ci.annotations(result(PARITY, *checks), limit)
    assert len(found) == shown
    if failures > limit:
        assert found[-1] == (
            f"::error title=edgecompile gate::{failures - limit + 1} more did not pass: they are in result.json"
        )
        assert [_command(a)[1]["title"][:3].strip() for a in found[:-1]] == [
            f"m{i}"[:3] for i in reversed(range(failures - limit + 1, failures))
        ]


def test_annotations_left_out_are_as_grave_as_the_worst_of_them():
    undecided = [dataclasses.replace(UNDECIDED, model=f"m{i}") for i in range(3)]
    assert ci.annotations(result(SLOWER, *undecided), 2)[-1].startswith("::warning title=edgecompile gate::3 more")


# -- JUnit XML -------------------------------------------------------------------------------------------------------

# What Jenkins' junit-10.xsd says of the elements in use: attributes that must and may be there, and children.
_RULES: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name"}, {"time", "classname", "group"},
                 {"skipped", "error", "failure", "system-out", "system-err"}),
    "skipped": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "failure": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}  # fmt: skip
_MIXED = {"skipped", "error", "failure", "system-out"}  # these may hold text
_TIME = r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]*)?"


def _violations(element: ET.Element) -> list[str]:
    if element.tag not in _RULES:
        return [f"no element {element.tag}"]
    must, may, children = _RULES[element.tag]
    found = [f"{element.tag} lacks {name}" for name in must - element.attrib.keys()]
    found += [f"{element.tag} has {name}" for name in element.attrib.keys() - must - may]
    found += [f"{child.tag} in {element.tag}" for child in element if child.tag not in children]
    if element.tag not in _MIXED and (element.text or "").strip():
        found.append(f"text in {element.tag}")
    if element.tag.startswith("testsuite") and not re.fullmatch(_TIME, element.get("time", "")):
        found.append(f"time {element.get('time')}")
    return found + [violation for child in element for violation in _violations(child)]


@every_result
def test_junit_keeps_to_the_schema_and_counts_right(made: GateResult):
    root = ET.fromstring(ci.junit(made))
    assert root.tag == "testsuites"
    assert _violations(root) == []
    suites = root.findall("testsuite")
    models = list(dict.fromkeys(c.model for c in made.checks))
    assert [s.get("name") for s in suites] == models + ["edgecompile gate"] * (made.error is not None)
    for where in (root, *suites):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            assert int(where.get(attribute, "")) == len(list(where.iter(tag)))
    cases = list(root.iter("testcase"))
    assert len(cases) == len({(c.get("classname"), c.get("name")) for c in cases})
    outcomes = {PASS: "system-out", FAIL: "failure", INCONCLUSIVE: "skipped"}
    wanted = [outcomes[c.verdict] for m in models for c in made.checks if c.model == m]
    assert [case[0].tag for case in cases] == wanted + ["error"] * (made.error is not None)


@pytest.mark.parametrize(
    ("old", "new", "violation"),
    [('tests="5"', 'tests="5" skipped="1"', "testsuites has skipped"), ("failure ", "broken ", "no element broken"),
     ('time="31.2"', 'time="3e1"', "time 3e1"), ("<properties>", "<properties>x", "text in properties"),
     (' value="FAIL"', "", "property lacks value")],
)  # fmt: skip
def test_the_check_of_the_schema_sees_a_violation(old: str, new: str, violation: str):
    text = ci.junit(MIXED).replace("</failure>", "</broken>" if "broken" in new else "</failure>")
    found = _violations(ET.fromstring(text.replace(old, new, 1)))
    assert violation in found


def test_junit_tells_the_facts():
    junitparser = pytest.importorskip("junitparser")
    net, other, _ = sorted(junitparser.JUnitXml.fromstring(ci.junit(MIXED).encode()), key=lambda s: s.name != "net")[:3]
    properties = {p.name: p.value for p in net.properties()}
    assert properties["artefact.candidate.digest"] == "0a" * 32
    assert properties["artefact.baseline.path"] == "main"
    assert properties["fingerprint.cpu"] == "EPYC 7B13"
    assert not [p for p in other.properties() if p.name.startswith("artefact")]
    assert net.timestamp == "2025-03-14T09:26:53"
    case = {c.name: c for c in net}["net/latency"]
    assert (case.classname, case.time) == ("net", 31.2)
    assert case.result[0].message == "slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed"
    assert case.result[0].type == "regression"
    (skipped,) = (c.result[0].message for s in (net, other, _) for c in s if c.is_skipped)
    assert skipped.endswith("7.8 % in 60 s (the baseline differs from itself)")


def test_two_models_of_one_name_after_cleaning_stay_two_suites():
    twins = result(*(dataclasses.replace(SLOWER, model=m, id=m) for m in ("a\nb", "a b")), artefacts=())
    assert ci.junit(twins).count("<testsuite ") == 2


# -- terminal --------------------------------------------------------------------------------------------------------


def _printed(made: GateResult, **options: Any) -> str:
    console = Console(file=io.StringIO(), **{"width": 80, **options})
    ci.print_result(made, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@every_result
def test_the_terminal_says_the_verdict_first_and_fits(made: GateResult):
    lines = _printed(made).splitlines()
    assert lines[0] == ci.headline(made)
    assert max(map(len, lines)) <= 80
    assert not [c for c in "".join(lines) if unicodedata.category(c) == "Cc"]


def test_the_terminal_tells_the_facts():
    text = _printed(MIXED, width=200)
    told = r"slower by 5\.3 % \(4\.1 to 6\.6 %\), 5 % is allowed"
    assert re.search(rf"FAIL +latency +{told} +8\.12 ms +8\.55 ms", text)
    assert "could have shown 7.8 % in 60 s (the baseline differs from itself)" in text
    assert "PASS     engine_size  engine size 24.0 MiB, 30.0 MiB is allowed" in text
    assert "note: the machine was busy" in text
    assert "fix: save one" in _printed(BROKEN)


def test_a_terminal_without_unicode_gets_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    ci.print_result(MIXED, Console(file=stream, width=80))
    stream.flush()
    assert "(-0.9 to 6.6 %)" in raw.getvalue().decode("ascii")


# -- foreign text ----------------------------------------------------------------------------------------------------

FRAGMENTS = [
    "\n", "\r", "\r\n", "\u2028", "\x85", "\x0b", "\x00", "\x1b[2J", "\x9b", "\x07", "\u202e", "\u2066", "\ufeff",
    "\ufffe", "\ud800", "\U0001f469\u200d", "`", "``", "|", "\\", "\\|", "<", ">", "</testsuite>", "<script>", "]]>",
    "&amp;", "&#10;", "--", "::", ":", ",", "%", "%0A", "%25", "::error::", "##[add-mask]", "##vso[", "=", "@team",
    "#1", "[x](http://example.com)", "![", "[bold]", "[/]", "*", "_", "~", "- ", "# ", "1. ", " ", "\t", "{{", '"', "'",
    "é", "x" * 600,
]  # fmt: skip
NAMES = st.one_of(
    st.text(st.characters(exclude_categories=()), min_size=1),
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12).map("".join),
).filter(str.strip)
few = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def named(name: str) -> GateResult:
    """A result with ``name`` in every place that text from outside can reach."""
    checks = tuple(
        dataclasses.replace(
            c, id=f"{name}{i}", model=f"{name}{i % 2}", reason=name, reason_code=name,
            place=f"{name}:3", clock=name, metric=c.metric if c.metric.startswith("latency") else name,
        )
        for i, c in enumerate((SMALL, UNDECIDED, SLOWER, DRIFTS))
    )  # fmt: skip
    return result(
        *checks,
        artefacts=(Artefact(name, checks[0].model, name, name, 1),),
        fingerprint={name: name, "deep": {name: [name, 1]}},
        settings={name: name},
        command=name,
        config_digest=name,
        started=name,
        versions={name: name},
        notes=(name,),
        error=Problem(name, name, name),
    )


HARMLESS = named("x")


@few
@given(NAMES)
def test_no_name_changes_the_structure_of_the_markdown(name: str):
    text = ci.markdown(named(name))
    kinds, words, _ = _tokens(text)
    plain_kinds, plain_words, _ = _tokens(ci.markdown(HARMLESS))
    assert (kinds, words) == (plain_kinds, plain_words)  # all that is foreign is inside code
    assert text.count("\n") == ci.markdown(HARMLESS).count("\n")
    assert not [c for c in text.replace("\n", "") if unicodedata.category(c)[0] == "C" and c != "\ufe0f"]


@few
@given(NAMES)
def test_no_name_changes_the_structure_of_the_xml(name: str):
    root, plain = (ET.fromstring(ci.junit(made)) for made in (named(name), HARMLESS))
    assert [(e.tag, sorted(e.keys())) for e in root.iter()] == [(e.tag, sorted(e.keys())) for e in plain.iter()]
    assert _violations(root) == []


@few
@given(NAMES)
def test_no_name_leaves_its_annotation(name: str):
    found = ci.annotations(named(name))
    assert len(found) == len(ci.annotations(HARMLESS)) == 3
    for line in found:
        assert line.splitlines() == [line]
        kind, properties, _ = _command(line)
        assert kind in ("error", "warning")
        assert set(properties) <= {"file", "line", "title"}
    kind, properties, message = _command(found[1])
    assert (kind, properties["line"]) == ("error", "3")
    assert properties["file"] == render_text.shorten(render_text.clean(name), 500)
    assert message.startswith("slower by 5.3 % (4.1 to 6.6 %), 5 % is allowed (")


@few
@given(NAMES)
def test_no_name_prints_a_line_or_a_command(name: str):
    made = named(name)
    assert _printed(made, width=9000).count("\n") == _printed(HARMLESS, width=9000).count("\n")
    for text in (_printed(made), _printed(made, width=30)):
        assert not [c for c in text.replace("\n", "") if unicodedata.category(c)[0] == "C"]
        assert "::" not in text  # however the lines are folded
        assert "##" not in text


@few
@given(NAMES)
def test_any_name_is_written_and_comes_back(name: str):
    made = named(name)
    assert GateResult.from_json(json.loads(json.dumps(made.to_json()))) == made


def _as_it_is(text: str, more: str = "") -> str:
    return text


@pytest.mark.parametrize(
    ("test", "where", "escape", "name"),
    [
        (test_no_name_changes_the_structure_of_the_markdown, render_text, "code", "[x](y)"),
        (test_no_name_changes_the_structure_of_the_markdown, render_text, "code", "<b>"),
        (test_no_name_changes_the_structure_of_the_markdown, render_text, "code", "@team"),
        (test_no_name_changes_the_structure_of_the_markdown, render_text, "cell", "|"),
        (test_no_name_changes_the_structure_of_the_xml, ci, "_foreign", "\x00"),
        (test_no_name_leaves_its_annotation, ci, "_foreign", "\u2028"),
        (test_no_name_leaves_its_annotation, ci, "_escaped", "a,line=9"),
        (test_no_name_leaves_its_annotation, ci, "_escaped", "::"),
        (test_no_name_leaves_its_annotation, ci, "_escaped", "%0A"),
        (test_no_name_prints_a_line_or_a_command, ci, "_inert", "::error::x"),
        (test_no_name_prints_a_line_or_a_command, ci, "_inert", "##[add-mask]x"),
    ],
)  # fmt: skip
def test_a_property_fails_without_its_escape(
    test: Any, where: Any, escape: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    test.hypothesis.inner_test(name)
    monkeypatch.setattr(where, escape, _as_it_is)
    with pytest.raises((AssertionError, KeyError, ValueError, ET.ParseError)):
        test.hypothesis.inner_test(name)


# -- files -----------------------------------------------------------------------------------------------------------


@every_result
def test_three_files_are_written_and_agree(made: GateResult, tmp_path: Path):
    folder = tmp_path / "deep" / "gate"
    ci.write(made, folder)
    ci.write(made, folder)  # again over the old ones
    assert sorted(p.name for p in folder.iterdir()) == ["junit.xml", "result.json", "summary.md"]
    assert GateResult.from_json(json.loads((folder / "result.json").read_text())) == made
    assert (folder / "junit.xml").read_text(encoding="utf-8") == ci.junit(made)
    assert (folder / "summary.md").read_text(encoding="utf-8") == ci.markdown(made)


def test_a_summary_is_appended_and_leaves_room_for_what_is_there(tmp_path: Path):
    summary, report = tmp_path / "summary", tmp_path / "junit.xml"
    summary.write_text("before\n")
    ci.append_summary(MIXED, summary)
    ci.write_junit(MIXED, report)
    assert summary.read_text(encoding="utf-8") == "before\n" + ci.markdown(MIXED)
    assert report.read_text(encoding="utf-8") == ci.junit(MIXED)
    for room in (500, 10):
        summary.write_bytes(b"x" * (ci.SUMMARY_LIMIT - room))
        ci.append_summary(MIXED, summary)
        assert ci.SUMMARY_LIMIT - 500 <= summary.stat().st_size <= ci.SUMMARY_LIMIT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junit.xml", "summary"]


def test_what_cannot_be_written_is_an_input_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for write, where in (
        (ci.write, tmp_path / "file"), (ci.write_junit, tmp_path / "none" / "x"), (ci.append_summary, tmp_path),
    ):  # fmt: skip
        with pytest.raises(InputError, match="cannot write"):
            write(MIXED, where)


# -- the examples ----------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parent.parent / "examples" / "ci"
PLANNED = {"gate", "baseline"}


def _commands() -> list[tuple[str, str]]:
    """Every edgecompile command line of the examples."""
    line = re.compile(r"^\s*(?:- )?(?:run: )?(edgecompile .+)$", re.M)
    files = sorted(EXAMPLES.iterdir())
    return [(f.name, command) for f in files for command in line.findall(f.read_text(encoding="utf-8"))]


def test_the_examples_hold_the_commands_that_make_a_gate():
    for name in ("github.yml", "gitlab.yml"):
        verbs = {command.split()[1] for file, command in _commands() if file == name}
        assert verbs == {"build", "gate", "baseline"}
    assert any("--replay" in command for file, command in _commands() if file == "README.md")


def _parse(command: str) -> None:
    """Hand a command line to the command that it names, without running it."""
    name, *arguments = shlex.split(command)[1:]
    found: click.Command | None = cli.main.commands.get(name)
    if found is None and name in PLANNED:
        pytest.skip(f"there is no command {name} yet")
    assert found is not None, f"there is no command {name}"
    context = click.Context(cli.main, info_name="edgecompile")
    while isinstance(found, click.Group):
        name, arguments = arguments[0], arguments[1:]
        context = click.Context(found, parent=context, info_name=name)
        found = found.commands[name]
    found.make_context(name, arguments, parent=context)


@pytest.mark.parametrize(("file", "command"), _commands())
def test_a_command_of_the_examples_can_be_parsed(
    file: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # for options that want a file that exists
    (tmp_path / "build" / "model").mkdir(parents=True)
    (tmp_path / "build" / "gate").mkdir()
    (tmp_path / "model.py").touch()
    (tmp_path / "edgecompile.toml").write_bytes((EXAMPLES / "edgecompile.toml").read_bytes())
    _parse(command)


@pytest.mark.parametrize("command", ["edgecompile build model.py --fast", "edgecompile build", "edgecompile bild x"])
def test_a_wrong_command_is_seen(command: str):
    with pytest.raises((click.UsageError, AssertionError)):
        _parse(command)


def test_the_example_configuration_is_what_the_gate_reads():
    limits = config.load_gate(EXAMPLES / "edgecompile.toml")
    assert (limits.max_regression, limits.time_limit, limits.parity.tolerance) == (0.05, 60.0, 1e-4)
    assert limits.budgets == {"engine_size": 30 << 20}


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml"])
def test_the_example_jobs_are_yaml(name: str):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert "\t" not in text
    assert all((len(line) - len(line.lstrip())) % 2 == 0 for line in text.splitlines())
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    document = yaml.safe_load(text)
    if name == "gitlab.yml":
        gate = document["latency-gate"]
        assert gate["artifacts"]["reports"]["junit"] == "build/gate/junit.xml"
        assert gate["allow_failure"] == {"exit_codes": [3]}
        assert document["latency-baseline"]["cache"]["policy"] == "pull-push"
        assert document["latency-baseline"]["cache"]["paths"] == document[".latency"]["cache"]["paths"]
        return
    steps = {step.get("name", step.get("uses")): step for step in document["jobs"]["gate"]["steps"]}
    restore, save = steps["Restore the baselines"]["with"], steps["Save the baselines"]["with"]
    assert (restore["path"], restore["key"]) == (save["path"], save["key"])
    assert save["key"].startswith(restore["restore-keys"])
