"""The gate's result as a document: its schema follows from the dataclasses, and refuses what cannot be true."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import pytest

from edgecompile import verdict
from edgecompile.errors import InputError
from edgecompile.verdict import ERROR, FAIL, INCONCLUSIVE, PASS, Artefact, Check, GateResult, Problem

SCHEMA = verdict.schema()
CLASSES = {GateResult: SCHEMA, **{c: SCHEMA["$defs"][c.__name__.lower()] for c in (Check, Artefact, Problem)}}
LATENCY: dict[str, Any] = {
    "unit": "s", "budget": 0.05, "baseline": 8.12e-3, "candidate": 8.55e-3, "estimate": 1.053, "low": 1.041,
    "high": 1.066, "alpha": 0.002, "pairs": 20, "seconds": 31.2, "clock": "thread_cpu", "place": "edgecompile.toml:3",
}  # fmt: skip


def latency(outcome: str, code: str, **changed: Any) -> Check:
    fields = LATENCY | {"reason": "all pairs agree"} | changed
    return Check("net/latency", "net", "latency", outcome, code, **fields)


CHECKS = {
    PASS: Check("net/parity", "net", "parity", PASS, "same_function", "", "relative error", 1e-4, None, 3e-6),
    FAIL: latency(FAIL, "regression"),
    INCONCLUSIVE: latency(INCONCLUSIVE, "time_limit", detectable=0.078, low=0.99),
}


def result(*verdicts: str, **changed: Any) -> GateResult:
    """A valid result whose checks have these verdicts; an error where there are none."""
    checks = tuple(dataclasses.replace(CHECKS[v], id=f"net/{i}") for i, v in enumerate(verdicts))
    outcome, code = verdict.overall(list(verdicts)) if verdicts else (ERROR, 4)
    fields: dict[str, Any] = {
        "checks": checks,
        "artefacts": (Artefact("candidate", "net", "build/net", "0a" * 32, 1234),),
        "fingerprint": {"cpu": "x", "cores": 2, "flags": ["avx"], "load": {"before": math.inf}},
        "settings": {"alpha": 0.01},
        "command": "edgecompile gate build/net",
        "config_digest": "1b" * 32,
        "started": "2025-03-14T09:26:53+00:00",
        "seconds": 31.4,
        "versions": {"edgecompile": "0.1.0"},
        "notes": ("the machine was busy",),
        "error": None if verdicts else Problem("there is no baseline main", "the store is empty", "save one"),
    }
    return GateResult(outcome, code, **fields | changed)


def errors(document: Any) -> list[str]:
    return [e.json_path for e in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document)]


# -- the schema and the dataclasses ----------------------------------------------------------------------------------


def test_the_schema_is_sound_and_closed_everywhere():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for node in (SCHEMA, *SCHEMA["$defs"].values(), *SCHEMA["properties"].values()):
        if node.get("type") == "object":
            assert node["additionalProperties"] is False or isinstance(node["additionalProperties"], dict)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_in_the_schema_and_nothing_else(cls: type):
    node = CLASSES[cls]
    names = {f.name for f in dataclasses.fields(cls)} | ({"schema"} if cls is GateResult else set())
    assert set(node["properties"]) == set(node["required"]) == names
    assert node["additionalProperties"] is False


def _allowed(kind: Any) -> set[str]:
    """The JSON types that an annotation stands for."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return set().union(*map(_allowed, typing.get_args(kind)))
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Mapping:
        return {"object"}
    if typing.get_origin(kind) is tuple:
        return {"array"}
    return {str: {"string"}, int: {"integer"}, float: {"number"}, type(None): {"null"}}[kind]


def _typed(node: Any) -> set[str]:
    """The JSON types that a schema accepts; infinity as a word counts as a number."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return {"number"} if name == "number" else _typed(SCHEMA["$defs"][name])
    if "anyOf" in node:
        return set().union(*map(_typed, node["anyOf"]))
    values = node.get("enum", [node["const"]] if "const" in node else [])
    if values:
        return {"integer" if isinstance(v, int) else "string" for v in values}
    return {node["type"]}


@pytest.mark.parametrize(("cls", "name"), [(c, f.name) for c in CLASSES for f in dataclasses.fields(c)])
def test_a_field_has_the_type_in_the_schema_that_it_has_in_the_class(cls: type, name: str):
    kind = typing.get_type_hints(cls)[name]
    node = CLASSES[cls]["properties"][name]
    assert _typed(node) == _allowed(kind)
    if typing.get_origin(kind) is tuple:
        assert _typed(node["items"]) == _allowed(typing.get_args(kind)[0])


def _words(of: str) -> set[str]:
    """What the documentation of a field of a check puts in code font."""
    text = re.search(rf"^ {{8}}{of}: (.*?)(?=^ {{8}}\w|\Z)", Check.__doc__ or "", re.M | re.S)
    assert text is not None
    return set(re.findall("``([^`]+)``", text[1]))


@pytest.mark.parametrize(
    ("field", "besides"),
    [("metric", set()), ("verdict", set()), ("reason_code", set()),
     ("unit", {"budget", "baseline", "candidate"}), ("clock", set())],
)  # fmt: skip
def test_the_words_of_the_schema_are_those_of_the_documentation(field: str, besides: set[str]):
    assert set(SCHEMA["$defs"]["check"]["properties"][field]["enum"]) - {""} == _words(field) - besides


# -- what can be true ------------------------------------------------------------------------------------------------

VALID = {
    "pass": result(PASS),
    "fail": result(PASS, FAIL, INCONCLUSIVE),
    "inconclusive": result(PASS, INCONCLUSIVE),
    "inconclusive as a warning": dataclasses.replace(result(INCONCLUSIVE), exit_code=0),
    "environment": result(),
    "usage": dataclasses.replace(result(), exit_code=2, artefacts=(), config_digest="", started=""),
    "defect": dataclasses.replace(result(), exit_code=70),
    "interrupted after a check": dataclasses.replace(result(), exit_code=130, checks=result(FAIL).checks),
    "no number": result(FAIL, checks=(dataclasses.replace(CHECKS[PASS], verdict=FAIL, reason_code="other_function",
                                                          reason="it is no number", candidate=math.nan),)),
    "nothing measured": result(INCONCLUSIVE, checks=(
        Check("net/p99", "net", "latency_p99", INCONCLUSIVE, "too_few_calls", "there was no call", "s", 9e-3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_what_can_happen_is_valid_and_comes_back(name: str):
    document = json.loads(json.dumps(VALID[name].to_json(), allow_nan=False))
    assert errors(document) == []
    assert GateResult.from_json(document).to_json() == document


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            document = document[int(key) if key.isdecimal() else key]
        document[last] = value

    return change


CONTRADICTIONS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "passed with exit code 1": ("pass", _set("exit_code", 1)),
    "failed with exit code 0": ("fail", _set("exit_code", 0)),
    "undecided with exit code 1": ("inconclusive", _set("exit_code", 1)),
    "error with exit code 1": ("environment", _set("exit_code", 1)),
    "error with exit code 3": ("environment", _set("exit_code", 3)),
    "unknown exit code": ("environment", _set("exit_code", 5)),
    "error without an error": ("environment", _set("error", None)),
    "error that says nothing": ("environment", _set("error.what", "")),
    "passed with an error": ("pass", _set("error", {"what": "x", "why": "", "fix": ""})),
    "passed without a check": ("pass", _set("checks", [])),
    "passed with a failure": ("fail", lambda d: d.update(verdict=PASS, exit_code=0)),
    "passed undecided": ("inconclusive", lambda d: d.update(verdict=PASS, exit_code=0)),
    "failed without a failure": ("pass", lambda d: d.update(verdict=FAIL, exit_code=1)),
    "undecided with a failure": ("fail", lambda d: d.update(verdict=INCONCLUSIVE, exit_code=3)),
    "undecided without": ("pass", lambda d: d.update(verdict=INCONCLUSIVE, exit_code=3)),
    "undecided for no reason": ("inconclusive", _set("checks.1.reason", "")),
    "failed for no reason": ("fail", _set("checks.1.reason", "")),
    "failed within budget": ("fail", _set("checks.1.reason_code", "no_regression")),
    "passed over budget": ("pass", _set("checks.0.reason_code", "other_function")),
    "undecided for the reason of a failure": ("inconclusive", _set("checks.1.reason_code", "regression")),
    "failed without a bound": ("fail", _set("checks.1.low", None)),
    "failed without pairs": ("fail", _set("checks.1.pairs", 0)),
    "failed without an estimate": ("fail", _set("checks.1.estimate", None)),
    "failed without a clock": ("fail", _set("checks.1.clock", "")),
    "estimate without a bound": ("inconclusive", _set("checks.1.high", None)),
    "parity without a measurement": ("pass", _set("checks.0.candidate", None)),
    "parity without a limit": ("pass", _set("checks.0.budget", None)),
    "unknown metric": ("pass", _set("checks.0.metric", "beauty")),
    "certainty": ("fail", _set("checks.1.alpha", 1)),
    "no line": ("fail", _set("checks.1.place", "edgecompile.toml")),
    "negative time": ("pass", _set("seconds", -1)),
    "other digest": ("pass", _set("artefacts.0.digest", "sha256:12")),
    "other role": ("pass", _set("artefacts.0.role", "friend")),
    "local time": ("pass", _set("started", "2025-03-14T09:26:53+01:00")),
    "unknown key": ("pass", _set("extra", 1)),
    "unknown key of a check": ("pass", _set("checks.0.extra", 1)),
    "other schema": ("pass", _set("schema", "edgecompile.gate/2")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_cannot_be_true_is_refused(name: str):
    start, change = CONTRADICTIONS[name]
    document = VALID[start].to_json()
    assert errors(document) == []
    change(document)
    assert errors(document)


@pytest.mark.parametrize("name", ["unknown key", "unknown key of a check", "other schema"])
def test_the_reader_refuses_another_form(name: str):
    start, change = CONTRADICTIONS[name]
    document = copy.deepcopy(VALID[start].to_json())
    change(document)
    with pytest.raises(InputError):
        GateResult.from_json(document)


@pytest.mark.parametrize("document", [None, [], {}, "edgecompile.gate/1", {"schema": "edgecompile.gate/1"}])
def test_what_is_no_result_is_refused(document: Any):
    assert errors(document)
    with pytest.raises(InputError):
        GateResult.from_json(document)


@pytest.mark.parametrize(
    ("verdicts", "outcome", "code"),
    [([PASS, PASS], PASS, 0), ([PASS, INCONCLUSIVE], INCONCLUSIVE, 3), ([INCONCLUSIVE, FAIL, PASS], FAIL, 1),
     ([FAIL], FAIL, 1)],
)  # fmt: skip
def test_the_worst_check_decides_and_failure_wins(verdicts: list[str], outcome: str, code: int):
    assert verdict.overall(verdicts) == (outcome, code)
