"""How two bundles compare in latency: an estimate with its interval, from pairs of fresh sessions, no verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompile import documents, measure, sequential, terminal
from edgecompile.bundle import Bundle
from edgecompile.errors import EnvironmentMissing
from edgecompile.judge import PAIR_SECONDS
from edgecompile.measure import Samples

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "edgecompile.compare/1"
CONFIDENCE = 0.99
_FEWEST = 8  # pairs; the first number that gives an interval of this confidence


@dataclass(frozen=True)
class Change:
    """Latency of B over that of A on one clock.

    Attributes:
        clock: ``thread_cpu``, ``wall`` or ``cuda_event``.
        first, second: median call of A and B, in seconds.
        ratio: Hodges-Lehmann estimate of B over A.
        low, high: its interval, with a confidence of 99 %; infinite where there are too few pairs.
    """

    clock: str
    first: float
    second: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What comparing found.

    Attributes:
        changes: on the clock that decides first; the wall clock beside it where it is another.
        pairs: pairs of sessions.
        dropped: why pairs were thrown away.
        seconds: wall time spent.
    """

    changes: tuple[Change, ...]
    pairs: int
    dropped: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The comparison as a JSON document."""
        return documents.encode(self, {Comparison: {"schema": lambda _: SCHEMA}})


def compare(
    first: Bundle,
    second: Bundle,
    board: Any,
    *,
    seconds: float = 30.0,
    precision: float = 0.005,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Let two bundles take turns until the interval is narrow enough, the time is up or there are 64 pairs.

    Args:
        first, second: the bundles, A and B.
        board: where, see :func:`edgecompile.remote.open_board`.
        seconds: wall time after which no further pair is begun; eight pairs are made in any case.
        precision: half the width of the interval, as a fraction, at which it is narrow enough.
        seed: of the order of sessions and blocks.
        progress: called with what is being done.

    Raises:
        EnvironmentMissing: an engine cannot run there, or no pair was left undisturbed.
    """
    say = progress or (lambda _: None)
    keys = {"A": board.add(first.path), "B": board.add(second.path)}
    rng = np.random.default_rng(seed)
    taken: list[tuple[Samples, Samples]] = []
    dropped: list[str] = []
    start = time.perf_counter()
    while True:
        pair, void = board.pair(keys, seconds=PAIR_SECONDS, seed=int(rng.integers(2**31)))
        if void:
            dropped.append(void)
        else:
            taken.append((pair["A"], pair["B"]))
        spent = time.perf_counter() - start
        say(f"{len(taken)} pairs, {spent:.0f} s")
        enough = len(taken) >= _FEWEST and _half_width(taken) <= math.log1p(precision)
        if enough or len(taken) == sequential.MOST_PAIRS or (spent >= seconds and len(taken) + len(dropped) >= _FEWEST):
            break
    if not taken:
        raise EnvironmentMissing(f"all {len(dropped)} pairs were disturbed", dropped[-1], "let the board cool down")
    changes = [_change(taken)]
    if changes[0].clock == "thread_cpu":
        changes.append(_change([(measure.on_wall_clock(a), measure.on_wall_clock(b)) for a, b in taken]))
    return Comparison(tuple(changes), len(taken), tuple(dropped), spent)


def _differences(taken: list[tuple[Samples, Samples]]) -> list[float]:
    return [measure.log_ratio(b, a) for a, b in taken]


def _half_width(taken: list[tuple[Samples, Samples]]) -> float:
    low, high = sequential.signed_rank_bounds(_differences(taken), (1 - CONFIDENCE) / 2)
    return high / 2 - low / 2


def _change(taken: list[tuple[Samples, Samples]]) -> Change:
    differences = _differences(taken)
    low, high = sequential.signed_rank_bounds(differences, (1 - CONFIDENCE) / 2)
    first, second = (float(np.median(np.concatenate([pair[arm].seconds for pair in taken]))) for arm in (0, 1))
    estimate = math.exp(sequential.hodges_lehmann(differences))
    return Change(taken[0][0].clock, first, second, estimate, math.exp(low), math.exp(high))


def print_table(found: Comparison, first: str, second: str, console: Console) -> None:
    """Print the comparison for a person."""
    from edgecompile import render_text

    main = found.changes[0]
    if main.low > 1:
        verdict = f"[red]B is slower than A by {main.ratio - 1:.1%}[/]"
    elif main.high < 1:
        verdict = f"[green]B is faster than A: {main.ratio:.3f} of its latency[/]"
    else:
        verdict = f"no difference that {found.pairs} pairs could show"
    console.print(f"{verdict}  (A {terminal.escape(first)}, B {terminal.escape(second)})", highlight=False)
    rows = [
        {
            "clock": c.clock,
            "A p50": render_text.seconds(c.first),
            "B p50": render_text.seconds(c.second),
            "B / A": f"{c.ratio:.4f}",
            "99 % interval": f"{c.low:.4f} to {c.high:.4f}",
        }
        for c in found.changes
    ]
    console.print(terminal.table("", rows))
    console.print(f"{found.pairs} pairs of sessions in {found.seconds:.0f} s", highlight=False)
    if found.dropped:
        console.print(f"{len(found.dropped)} pairs were disturbed: {terminal.escape(found.dropped[-1])}")
