"""The errors a user can meet: what happened, why, and how to fix it.

Exit codes are those of every command: 0 done, 1 gate or parity failed, 2 bad input or usage, 3 inconclusive,
4 environment, 70 a defect of edgecompile, 130 interrupted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EdgecompileError(Exception):
    """Root of every error edgecompile raises on purpose.

    Args:
        what: one line saying what could not be done, naming the file, node or option.
        why: the cause, as far as it is known.
        fix: what the user can do about it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, why: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(self.why)
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "; ".join(parts)

    def __reduce__(self):
        return type(self), (self.what, self.why, self.fix)


class InputError(EdgecompileError):
    """A file, option or model that edgecompile cannot use (exit 2)."""


class PassError(EdgecompileError):
    """A pass left the graph invalid or changed what it computes (exit 1, only with ``--strict``)."""

    exit_code = 1


class ParityError(EdgecompileError):
    """Two models that should compute the same do not (exit 1)."""

    exit_code = 1


class EnvironmentMissing(EdgecompileError):
    """A runtime, device or package is missing or does not match (exit 4)."""

    exit_code = 4


def missing_extra(what: str, package: str, extra: str) -> EnvironmentMissing:
    """The error for a command that needs a package of an extra that is not installed."""
    return EnvironmentMissing(what, f"the package {package} is not installed", f"pip install 'edgecompile[{extra}]'")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``did you mean 'NAME'?`` for the choice that is closest to ``name``; ``""`` if none is close."""
    close = difflib.get_close_matches(name, list(choices), 1)
    return f"did you mean {close[0]!r}?" if close else ""
