"""Channel pruning: the channels that matter least go, until the graph takes a share of its time or parameters.

1. *Groups.* Which channels go together, and which cannot go (:mod:`~edgecompile.passes.prune.dependency`).
2. *Scores.* How much each unit matters (:mod:`~edgecompile.passes.prune.scores`).
3. *Widths.* For a share of the latency, the layers are timed on the target at several widths and the cut graph against
   the original, interleaved; a cut that does not pay in measured time is undone. For a share of the parameters nothing
   is timed (:mod:`~edgecompile.passes.prune.widths`).
4. *Repair.* Without training, on calibration data (:mod:`~edgecompile.passes.prune.repair`).
5. *Plan.* What stays, as a file (:mod:`~edgecompile.passes.prune.plan`), which cuts the same graph again, or the torch
   module that it came from.

Sources: as named in these modules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgecompile import __version__, qdq, stats
from edgecompile.errors import InputError
from edgecompile.graph import Graph, any_matches, globs, provenance
from edgecompile.measure import Ratio
from edgecompile.oracle import Feeds, OutputError
from edgecompile.passes.prune import losses
from edgecompile.passes.prune import repair as repairs
from edgecompile.passes.prune import scores as measures
from edgecompile.passes.prune import widths as search
from edgecompile.passes.prune.dependency import Group, Groups, groups
from edgecompile.passes.prune.plan import Plan
from edgecompile.passes.prune.rules import key
from edgecompile.passes.prune.torch_side import apply as apply
from edgecompile.pipeline import ANY_DROP, Context, Drop, Pass, PassResult
from edgecompile.pruning import PrunedGroup, PrunedPoint, Pruning
from edgecompile.sensitivity import Memo

_SAMPLES = 256  # of the calibration data
_JUDGED = 4  # samples that the curve's errors are measured on
_CURVE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_BACK = (0.0, 0.25, 0.5, 0.75)  # how far from the target towards the original, where a score is to be kept
_TIMING = 3.0  # seconds per arm of one comparison of whole graphs


@dataclass(frozen=True)
class Prune(Pass):
    """Channels removed by importance, to a share of the latency or of the parameters.

    Attributes:
        params: share of the parameters to keep; 0 if latency is the goal.
        latency: share of the measured latency to keep; 0 if parameters are the goal.
        score: what importance is: ``magnitude``; or, from calibration data, ``activation``, ``reconstruction`` or
            ``taylor``.
        align: channels that widths are multiples of: 8, 16, 32 or another number; 0 for what the target runs well.
        repair: solve for the weights of the layers after a cut on calibration data.
        skip: globs of group names, weights or module paths (or a parent) that stay whole, separated by commas.
        min_snr: least signal-to-noise ratio of each output in dB; a result below it is rejected.
        max_drop: most that the score of ``evaluate(run)`` may fall, over this pass and those before it that keep one;
            less is cut until it holds.
        seconds: time for timing layers, of which those left are estimated, and again for measuring losses.
        plan: file that the plan is written to; without params and latency, file of the plan to apply.
    """

    name: ClassVar[str] = "prune"
    exact: ClassVar[bool] = False
    params: float = 0.0
    latency: float = 0.0
    score: str = "magnitude"
    align: int = 0
    repair: bool = False
    skip: str = ""
    min_snr: float = -math.inf
    max_drop: Drop = ANY_DROP
    seconds: float = 120.0
    plan: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.params < 1 and 0 <= self.latency < 1):
            raise ValueError("params and latency are shares above 0 and below 1, like 0.7")
        if self.params and self.latency:
            raise ValueError("give params or latency, not both")
        if not self.params and not self.latency and not self.plan:
            raise ValueError("give params=0.7, latency=0.7 or a plan to apply")
        if self.score not in measures.SCORES:
            raise ValueError(f"score is {self.score!r}; it may be {', '.join(measures.SCORES)}")
        if self.align < 0 or not self.seconds > 0 or math.isnan(self.min_snr):
            raise ValueError("align must not be negative, seconds must be above 0, and min_snr a number")

    @property
    def _applies(self) -> bool:
        return not self.params and not self.latency

    @property
    def needs_data(self) -> bool:
        """Whether it cannot run without calibration data."""
        return self.repair or (self.score != "magnitude" and not self._applies)

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite ``graph`` in place.

        Raises:
            InputError: there is no calibration data, no target to time on or no score to keep where one is needed; or
                the goal cannot be reached, or the plan does not fit the graph.
            EnvironmentMissing: ``score=taylor`` without torch.
        """
        graph.tidy()
        feeds = []
        if context.calibration is not None:
            feeds = list(itertools.islice(context.calibration.feeds(), _SAMPLES))
        if self.repair and not feeds:
            raise InputError(
                "prune{repair=true} needs calibration data", "weights are solved for on it",
                "give images or arrays with --calib, or leave the repair out",
            )  # fmt: skip
        found = _without(groups(graph), graph, self.skip)
        for group in found.whole:
            context.note(f"{group.name} stays whole ({group.units} units): {group.reason}")
        if not found.prunable:
            context.note("no channels can be cut")
            return context.result()
        judged = (feeds or list(context.feeds))[:_JUDGED]
        if self._applies:
            keep = Plan.load(self.plan).keep(graph, found)
            importance = measures.compute("magnitude", graph, found, ())
            chosen = _Choice({g.name: len(keep.get(g.name, range(g.units))) for g in found.prunable}, keep, None, None)
            return self._apply(graph, context, found, importance, chosen, None, feeds, judged)
        importance = measures.compute(self.score, graph, found, feeds)
        choose, way, align = self._search(graph, context, found, importance, feeds)
        chosen = self._within_drop(graph, context, found, feeds, choose)
        if chosen is None:
            context.note(f"nothing is cut: no share from {self._target:g} on keeps the score within {self.max_drop}")
            return context.result()
        return self._apply(graph, context, found, importance, chosen, way, feeds, judged, align)

    @property
    def _target(self) -> float:
        return self.params or self.latency

    # -- choice --------------------------------------------------------------------------------------------------------

    def _search(
        self, graph: Graph, context: Context, found: Groups, importance: measures.Scores, feeds: Sequence[Feeds]
    ) -> tuple[Callable[[float], _Choice], search.Path, int]:
        """What chooses widths for a share, the path that it chooses from, and the alignment."""
        if self.params:
            align = self.align or search.ALIGNMENTS[0]
            choices = search.candidates(found, graph, align)
            lost = self._losses(graph, context, found, importance, choices, feeds)
            way = search.by_parameters(graph, found, importance, choices, lost)

            def by_parameters(share: float) -> _Choice:
                widths = search.fit_parameters(graph, found, importance, way, share)
                return _Choice(widths, search.keep(importance, widths), None, None)

            return by_parameters, way, align
        timer = context.measure
        if timer is None:
            raise InputError(
                "prune{latency} has no target to time on", "layers and graphs are timed on it",
                "run it with `edgecompile build`, or give prune{params=0.7}",
            )  # fmt: skip
        sample = next(iter(context.feeds), None) or next(iter(feeds), None)
        sized = stats.shaped(graph, sample)
        facts = {"what": "layers", "version": __version__, **timer.facts}
        with Memo(context.cache, facts) as memo:
            align = self.align or search.alignment(sized, found, timer, memo)
            choices = search.candidates(found, graph, align)
            table = search.table(
                sized, found, timer, memo, choices=choices, seconds=self.seconds, progress=context.progress
            )
        if table.estimated:
            context.note(f"{len(table.estimated)} of {len(table.seconds)} layers were not timed: the time ran out")
        lost = self._losses(graph, context, found, importance, choices, feeds)
        whole = search.path(found, importance, choices, table, losses=lost)

        def by_latency(share: float) -> _Choice:
            way, allowed = whole, dict(choices)
            while True:
                made = search.fit(
                    graph, found, importance, way, share, timer, seconds=_TIMING, progress=context.progress
                )
                with Memo(context.cache, facts) as memo:
                    undone = search.unpaid(sized, found, importance, made.widths, timer, memo)
                if not undone:
                    return _Choice(made.widths, search.keep(importance, made.widths), made.ratio, table)
                for name in undone:
                    units = found[name].units
                    context.note(f"{name}: cut from {units} to {made.widths[name]} units, undone: it did not pay")
                    allowed[name] = [units]
                way = search.path(found, importance, allowed, table, losses=lost)

        return by_latency, whole, align

    def _losses(
        self, graph: Graph, context: Context, found: Groups, importance: measures.Scores,
        choices: Mapping[str, Sequence[int]], feeds: Sequence[Feeds],
    ) -> losses.Losses | None:  # fmt: skip
        """What the outputs lose by each width; None without data."""
        if not feeds:
            return None
        return losses.measured(
            graph, found, importance, choices, feeds, merge=self.repair, seconds=self.seconds, progress=context.progress
        )

    def _within_drop(
        self, graph: Graph, context: Context, found: Groups, feeds: Sequence[Feeds], choose: Callable[[float], _Choice]
    ) -> _Choice | None:
        """The widths for the target, or for the nearest share that keeps the score; None if there is none."""
        if not self.max_drop.limited:
            return choose(self._target)
        if context.evaluate is None or (base := context.base(graph)) is None:
            raise InputError(
                f"max_drop={self.max_drop} needs a score", "there is none to ask",
                "run it with `edgecompile build model.py`, where model.py defines evaluate(run)",
            )  # fmt: skip
        for back in _BACK:
            share = self._target + back * (1 - self._target)
            chosen = choose(share)
            cut = graph.copy()
            found.cut(cut, chosen.keep)
            if self.repair:
                repairs.repair(graph, cut, found, chosen.keep, feeds, progress=context.progress)
            score = context.evaluate(cut, False)
            if self.max_drop.holds(score, base):
                return chosen
            context.note(f"a share of {share:.2f} scores {score:.4g} of {base:.4g}: too little")
        return None

    # -- the cut -------------------------------------------------------------------------------------------------------

    def _apply(
        self, graph: Graph, context: Context, found: Groups, importance: measures.Scores, chosen: _Choice,
        way: search.Path | None, feeds: Sequence[Feeds], judged: Sequence[Feeds], align: int = 0,
    ) -> PassResult:  # fmt: skip
        """Cut, repair, write the plan, and say what was done."""
        keep: dict[str, np.ndarray] = {}
        for name, units in chosen.keep.items():
            group = found[name]
            share = float(importance[name][units].sum() / importance[name].sum())
            text = f"{group.units} -> {len(units)} units, {share:.1%} of the importance stays"
            if context.rewrite(text, group.name):
                keep[name] = units
        original = graph.copy()
        if self.plan and not self._applies:
            Plan.of(original, found, keep).save(Path(self.plan))
        found.cut(graph, keep)
        unrepaired = None
        if self.repair and keep:
            done = repairs.repair(original, graph, found, keep, feeds, progress=context.progress)
            unrepaired = done.before
            context.note(
                f"repair: {done.solved} layers solved for, {done.shifted} biases and {done.norms} norms corrected; "
                f"{done.before:.1f} dB became {done.after:.1f} dB"
                + ("" if done.kept else ", which is no better, so it was not kept")
            )
        reference = list(map(qdq.kernels(original), judged))
        whole = _parameters(original)

        def snr(cut: Graph) -> float:
            return qdq.snr(reference, map(qdq.kernels(cut), judged)) if judged else math.nan

        points = []
        for share in sorted({*_CURVE, self._target} if way else (), reverse=True):
            widths = chosen.widths if way and share == self._target else way.at(share) if way else {}
            trial_keep = search.keep(importance, widths)
            trial = original.copy()
            found.cut(trial, trial_keep)
            cost = chosen.ratio.value if share == self._target and chosen.ratio else share
            points.append(
                PrunedPoint(
                    cost, _parameters(trial) / whole, measures.share_kept(importance, trial_keep), snr(trial),
                    share == self._target,
                )
            )  # fmt: skip
            if way and share < 1 and way.costs and way.costs[-1] > share:
                break
        rows = [
            PrunedGroup(
                g.name, g.units, len(keep.get(g.name, range(g.units))),
                measures.share_kept(importance, {g.name: keep[g.name]}) if g.name in keep else 1.0,
                search.group_seconds(chosen.table, chosen.widths, g) * 1e6 if chosen.table and g.name in keep else None,
                g.reason,
            )
            for g in found.groups
        ]  # fmt: skip
        made = Pruning(
            "plan" if self._applies else "parameters" if self.params else "latency", self._target, self.score, align,
            _parameters(graph) / whole, chosen.ratio, snr(graph), unrepaired, tuple(rows), tuple(points),
        )  # fmt: skip
        return context.result(pruning=made)

    def reject(self, errors: Mapping[str, OutputError], rounding: Mapping[str, float]) -> str:
        """Why the outputs are not acceptable: not finite, or below ``min_snr``."""
        for name, error in errors.items():
            if error.snr_db == -math.inf and error.max_abs == math.inf:
                return f"output {name!r} is not finite where it was"
            if error.snr_db < self.min_snr:
                return f"output {name!r} has {error.snr_db:.1f} dB, {self.min_snr:g} are asked for"
        return ""


@dataclass(frozen=True)
class _Choice:
    """Widths of all groups, the units that stay of those that are cut, and what was measured."""

    widths: search.Widths
    keep: Mapping[str, np.ndarray]
    ratio: Ratio | None
    table: search.Table | None


def _parameters(graph: Graph) -> int:
    return sum(v.size for v in graph.constants().values() if v.dtype.kind in "fV")


def _without(found: Groups, graph: Graph, skip: str) -> Groups:
    """The groups, with those that the user's globs name kept whole."""
    patterns = globs(skip)
    modules = {key(n): provenance(n).modules for n in graph.nodes}

    def held(group: Group) -> Group:
        names = {group.name, *(m.tensor for m in group.members)}
        paths = {path for m in group.members for path in modules[m.node]}
        named = any_matches(names, paths, patterns)
        return replace(group, reason="it is skipped") if named and group.prunable else group

    return replace(found, groups=tuple(map(held, found.groups)))
