"""What channel pruning did and what else it might have done, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

from edgecompile.measure import Ratio


@dataclass(frozen=True)
class PrunedGroup:
    """Channels that go together.

    Attributes:
        name: of the group, by the first layer that makes the channels.
        before, after: units.
        kept: share of the group's importance that stays.
        saved: microseconds that the cut saves in the group's layers, by the table; None if nothing was timed.
        reason: why it stays whole, ``""`` if it may be cut.
    """

    name: str
    before: int
    after: int
    kept: float
    saved: float | None
    reason: str = ""


@dataclass(frozen=True)
class PrunedPoint:
    """One point of the search's path.

    Attributes:
        cost: share of the latency (by the table) or of the parameters that is left.
        parameters: share of the parameters that is left.
        kept: product over the groups of the share of their importance that stays.
        snr: of the outputs in dB, before any repair.
        chosen: this is what was built.
    """

    cost: float
    parameters: float
    kept: float
    snr: float
    chosen: bool = False


@dataclass(frozen=True)
class Pruning:
    """One run of the pass.

    Attributes:
        goal: ``latency``, ``parameters`` or ``plan``.
        target: share that was asked for; 0 for a plan.
        score: how importance was measured.
        align: channels that widths are multiples of.
        parameters: share of the parameters that is left.
        latency: measured share of the latency of the graph before the cut; None if it was not timed.
        snr: of the outputs in dB on the data at hand, as built.
        unrepaired: the same before the repair; None without one.
        groups: all of them, in the order of the graph.
        curve: what other shares would cost, the original's first.
    """

    goal: str
    target: float
    score: str
    align: int
    parameters: float
    latency: Ratio | None
    snr: float
    unrepaired: float | None
    groups: tuple[PrunedGroup, ...]
    curve: tuple[PrunedPoint, ...]
