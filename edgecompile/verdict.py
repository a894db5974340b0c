"""What a gate found: one document, ``edgecompile.gate/1``, that every output for CI is made from.

A verdict has three values. INCONCLUSIVE is not a weak PASS: it says that this machine, in this time, could not tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from edgecompile import documents
from edgecompile.errors import InputError

SCHEMA = "edgecompile.gate/1"
PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
ERROR = "ERROR"  # no verdict was reached: bad input, a missing environment, a defect or an interruption
_EXIT = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3}


@dataclass(frozen=True)
class Check:
    """One thing that was checked of one model.

    Attributes:
        id: unique within the result, e.g. ``shvit_s1/latency``.
        model: name of the candidate.
        metric: ``parity``, ``latency`` (against the baseline), ``latency_anchor`` (against the release anchor), or the
            budget's key: ``latency_p50``, ``latency_p99``, ``peak_memory``, ``engine_size``, ``build_time``,
            ``accuracy``, ``dla_fallback``, ``parity_budget``.
        verdict: ``PASS``, ``FAIL`` or ``INCONCLUSIVE``.
        reason_code: why, for machines: ``regression``, ``no_regression``, ``drift`` (slower for certain, but by less
            than half of what is allowed), ``time_limit``, ``aa_differs``, ``throttled``, ``holm``, ``too_few_calls``,
            ``within_budget``, ``over_budget``, ``same_function``, ``other_function``.
        reason: why, in one sentence for people.
        unit: of ``budget``, ``baseline`` and ``candidate``: ``s``, ``bytes``, ``relative error``, ``score`` or
            ``layers``.
        budget: what is allowed, in ``unit``; for ``latency``, the fraction by which it may grow.
        baseline, candidate: what was measured; for latencies the lower quartile over all calls.
        estimate: candidate's latency over the baseline's, Hodges-Lehmann.
        low, high: bounds of ``estimate`` at ``alpha``.
        alpha: one-sided error probability of this check at the look that decided.
        pairs: pairs of sessions compared.
        seconds: wall time that the check took.
        clock: ``thread_cpu``, ``wall`` or ``cuda_event``.
        detectable: the smallest regression, as a fraction, that these samples could have shown.
        place: where in the configuration the limit is set, ``edgecompile.toml:12``, or ``""``.
    """

    id: str
    model: str
    metric: str
    verdict: str
    reason_code: str
    reason: str
    unit: str = ""
    budget: float | None = None
    baseline: float | None = None
    candidate: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    alpha: float | None = None
    pairs: int = 0
    seconds: float = 0.0
    clock: str = ""
    detectable: float | None = None
    place: str = ""


@dataclass(frozen=True)
class Artefact:
    """A bundle that took part.

    Attributes:
        role: ``candidate``, ``baseline`` or ``anchor``.
        model: name of the candidate it belongs to.
        path: as given.
        digest: SHA-256 of its manifest, which lists the digests of all its files.
        bytes: size of the engine's files, or of ``model.onnx`` where the engine has none.
    """

    role: str
    model: str
    path: str
    digest: str
    bytes: int


@dataclass(frozen=True)
class Problem:
    """Why there is no verdict; the fields of :class:`edgecompile.errors.EdgecompileError`."""

    what: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class GateResult:
    """The whole outcome of one run of the gate.

    Attributes:
        verdict: ``FAIL`` if a check failed, else ``INCONCLUSIVE`` if one was, else ``PASS``; ``ERROR`` without any.
        exit_code: of the command: 0, 1, 3, and with ``error`` 2, 4, 70 or 130.
        checks: in the order they were made.
        artefacts: the bundles.
        fingerprint: of the machine that measured, see :func:`edgecompile.fingerprint.fingerprint`.
        settings: the plan and the limits, as used.
        command: the command line.
        config_digest: SHA-256 of the configuration file, or ``""``.
        started: UTC time in ISO 8601.
        seconds: wall time in all.
        versions: of edgecompile and the runtimes.
        notes: what else a reader should know, one sentence each.
        error: why there is no verdict, or None.
    """

    verdict: str
    exit_code: int
    checks: tuple[Check, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    config_digest: str = ""
    started: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: Problem | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON document."""
        return documents.encode(self, _DERIVED)

    @classmethod
    def from_json(cls, document: Any) -> GateResult:
        """Read a document that :meth:`to_json` wrote.

        Raises:
            InputError: it is not a result, or one of another version.
        """
        if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
            found = document.get("schema") if isinstance(document, Mapping) else None
            raise InputError(f"this is not a result of the schema {SCHEMA}", f"its schema is {found!r}")
        try:
            return documents.decode(cls, document, "result", _DERIVED)
        except documents.Malformed as error:
            raise InputError("the result cannot be read", str(error)) from None


_DERIVED: documents.Derived = {GateResult: {"schema": lambda _: SCHEMA}}


def overall(verdicts: list[str]) -> tuple[str, int]:
    """The verdict of a run from those of its checks, and its exit code; a failure wins over everything."""
    verdict = next((v for v in (FAIL, INCONCLUSIVE) if v in verdicts), PASS)
    return verdict, _EXIT[verdict]


def schema() -> dict[str, Any]:
    """The JSON Schema of the document (draft 2020-12)."""
    return json.loads(resources.files("edgecompile").joinpath("schemas/gate.schema.json").read_text())
