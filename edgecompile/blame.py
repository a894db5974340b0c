"""Which line of the user's own code an error comes from.

An exporter fails deep inside torch; what a person can act on is the line of their model that led there. It is found
from the exception's traceback, from the graph node the exporter was translating, or from what the message quotes.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

Place = tuple[Path, int]

# How Python tracebacks, faulthandler and torch's graphs quote a source line, the last one as path:line:column or
# path(line).
_QUOTED = (
    re.compile(r'File "(?P<path>[^"\n]+)", line (?P<line>\d+)'),
    re.compile(r"(?P<path>[^\s'\"(]+\.py)(?::(?P<line>\d+)|\((?P<line2>\d+)\))"),
)
_LIMIT = 300


class User:
    """Tells the user's files from those of Python and installed packages.

    Args:
        home: folder of the user's file; None if there is none, then any file outside Python and its packages counts.
        file: what to call the user's file where no line of it is known.
    """

    def __init__(self, home: Path | None = None, file: str = ""):
        self.file = file
        self.home = home.resolve() if home else None
        names = {sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")}
        libraries = [Path(n).resolve() for n in names] + [Path(__file__).resolve().parent]
        torch = getattr(sys.modules.get("torch"), "__file__", None)
        if torch:
            libraries.append(Path(torch).resolve().parent)
        self._libraries = libraries
        self._installed = self.home is not None and any(self.home.is_relative_to(x) for x in libraries)

    def owns(self, path: str | os.PathLike[str]) -> bool:
        """True if the file is the user's."""
        if str(path).startswith("<"):
            return False
        full = Path(path).resolve()
        if self._installed:
            assert self.home is not None
            return full.is_relative_to(self.home)
        return "site-packages" not in full.parts and not any(full.is_relative_to(x) for x in self._libraries)

    def name(self, place: Place) -> str:
        """``file:line``, the file relative to the user's folder or the working directory where it lies in one."""
        path, line = place[0].resolve(), place[1]
        for root in (self.home, Path.cwd()):
            if root is not None and path.is_relative_to(root):
                return f"{path.relative_to(root)}:{line}"
        return f"{path.name}:{line}"

    def place(self, error: BaseException) -> str:
        """``file:line`` of the innermost line of the user's code that led to ``error``, or ``""``."""
        for finder in (_raised, _translated, _quoted):
            for link in chain(error):
                found = [p for p in finder(link) if self.owns(p[0])]
                if found:
                    return self.name(found[-1])
        return ""

    def defined(self, function: object) -> str:
        """``file:line`` where a function or class of the user's is defined, or ``""``."""
        try:
            path, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]  # type: ignore[arg-type]
        except (TypeError, OSError):
            return ""
        return self.name((Path(path), line)) if path and self.owns(path) else ""

    def quoted(self, text: str) -> str:
        """``file:line`` of the first of the user's lines that ``text`` quotes, or ``""``."""
        return next((self.name(p) for p in _places(text) if self.owns(p[0])), "")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what caused it, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def root_cause(error: BaseException) -> BaseException:
    """The end of the chain of explicit causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LIMIT else text[: _LIMIT - 3] + "..."


def _raised(error: BaseException) -> list[Place]:
    """Lines of the traceback, outermost first; a syntax error has its line in itself."""
    places = [(Path(t.tb_frame.f_code.co_filename), t.tb_lineno) for t in _frames(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((Path(error.filename), error.lineno or 1))
    return places


def _translated(error: BaseException) -> list[Place]:
    """Lines that made the graph node an exporter was at work on: an fx node, or a TorchScript node."""
    places = []
    for frame in _frames(error.__traceback__):
        node = frame.tb_frame.f_locals.get("node")
        meta, source = getattr(node, "meta", None), getattr(node, "sourceRange", None)
        if isinstance(meta, dict):
            places += _places(str(meta.get("stack_trace") or ""))
        elif callable(source):
            places += _places(str(source()))[::-1]  # TorchScript lists the innermost frame first
    return places


def _quoted(error: BaseException) -> list[Place]:
    return _places(str(error))


def _places(text: str) -> list[Place]:
    found = [
        (match.start(), (Path(match["path"]), int(match["line"] or match.groupdict().get("line2") or 0)))
        for pattern in _QUOTED
        for match in pattern.finditer(text)
    ]
    return [place for _, place in sorted(found)]


def innermost_self(error: BaseException, kind: type) -> object | None:
    """The innermost object of a class whose method was running when ``error`` was raised."""
    found = (t.tb_frame.f_locals.get("self") for t in _frames(error.__traceback__))
    return next((x for x in reversed([*found]) if isinstance(x, kind)), None)


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
