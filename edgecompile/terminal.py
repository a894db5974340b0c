"""What the commands print with: tables, JSON, progress; names that come from a model are escaped everywhere."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from edgecompile import documents

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_LOG_SECONDS = 10.0  # between two lines of a log that differ in their numbers only


def printable(text: str) -> str:
    """``text`` on one line, control and direction-changing characters escaped: names may come from a hostile model."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def si(value: float | None) -> str:
    """A number to four digits with its SI prefix and a space, ``1.25 G``; ``?`` for None."""
    if value is None:
        return "? "
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} P"


def console() -> Console:
    """Where tables for people go."""
    from rich.console import Console

    return Console(soft_wrap=False)


def escape(text: str) -> str:
    """:func:`printable`, and safe to print where rich reads markup."""
    from rich import markup

    return markup.escape(printable(text))


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as a table: their keys are the columns, numbers stand right."""
    from rich import box
    from rich.table import Table

    made = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD)
    for key in rows[0] if rows else ():
        made.add_column(key, justify="right" if isinstance(rows[0][key], (int, float)) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(v) for v in row.values()))
    return made


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def print_json(document: Any) -> None:
    """Print a document for machines on stdout."""
    click.echo(json.dumps(documents.encode(document, {}), indent=1))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """On a terminal a spinner with elapsed time, and a bar where a text ends in a percentage; elsewhere plain lines on
    stderr, few of those that count."""
    if not sys.stderr.isatty():
        last = ("", -math.inf)

        def line(text: str) -> None:
            nonlocal last
            kind, now = re.sub(r"[0-9]+", "0", text), time.monotonic()
            if kind != last[0] or now - last[1] >= _LOG_SECONDS:
                last = (kind, now)
                click.echo(f"... {printable(text)}", err=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    class Bar(BarColumn):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.fields["share"] else ""

    columns = (SpinnerColumn(), TextColumn("{task.description}"), Bar(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=100, share=False)

        def say(text: str) -> None:
            share = re.search(r"\b([0-9]{1,3})%$", text)
            bar.update(task, description=escape(text), completed=int(share[1]) if share else 0, share=bool(share))

        yield say
