"""When to stop comparing two models, and what to conclude: exact rank statistics looked at a few times.

The unit is the pair of sessions, and what a pair says is one number, the logarithm of the candidate's latency over the
baseline's (:func:`edgecompile.measure.log_ratio`). Which arm goes first is drawn, so two equal arms give numbers that
are symmetric about 0, whatever their distribution, and the signed-rank test needs no more than that.

Sources: Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd ed., sections 3.1 to 3.3 (signed ranks,
the Hodges-Lehmann estimate and Tukey's interval); Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2
(percentiles); Ye, Li, Liu and Yao, Statistics in Medicine 32 (2013), 1112 (Holm's procedure with several looks).

Everything is a pure function of its arguments: the same numbers give the same verdict, bit for bit, in any order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from edgecompile.verdict import FAIL, PASS

MOST_PAIRS = 64
"""The longest sample for which the null distribution of the signed-rank statistic is computed."""

_AA_PAIRS = 6  # the fewest A/A pairs that show a shift of two standard deviations nine times in ten, at 1 %
_POWER = 0.95  # of the detectable effect, were the interval's width known; a short sample's is not


# -- signed ranks ------------------------------------------------------------------------------------------------------


def hodges_lehmann(d: ArrayLike) -> float:
    """The median of the averages of all pairs of values, each with itself too (Walsh averages).

    Args:
        d: finite numbers [n], 1 to 64 of them.

    Raises:
        ValueError: there are none, too many, or some are not finite.
    """
    return _middle(_walsh(d))


def signed_rank_bounds(d: ArrayLike, alpha: float) -> tuple[float, float]:
    """Bounds of the centre of symmetry, each of which fails with a probability of at most ``alpha``.

    They are Walsh averages, and belong to :func:`signed_rank_pvalue`: it is at most ``alpha`` exactly if the shift lies
    under the lower bound, ties and zeros included.

    Args:
        d: finite numbers [n], 1 to 64 of them.
        alpha: one-sided, above 0 and below 0.5.

    Returns:
        lower and upper bound; ``-inf`` and ``inf`` where even ``n`` values of one sign are likelier than ``alpha``.

    Raises:
        ValueError: the numbers or ``alpha`` are not as above.
    """
    walsh = _walsh(d)
    return _bounds(walsh, len(np.asarray(d)), alpha)


def signed_rank_pvalue(d: ArrayLike, shift: float = 0.0) -> float:
    """Exact one-sided p-value of Wilcoxon's signed-rank test that the centre of symmetry lies above ``shift``.

    The statistic is the number of Walsh averages above ``shift``; without ties it is the sum of the ranks of the values
    above. A value equal to ``shift``, and two values at the same distance on either side of it, count against the
    alternative, as if every value were smaller by a hair; so the p-value is never too small.

    Args:
        d: finite numbers [n], 1 to 64 of them.
        shift: finite.

    Raises:
        ValueError: the numbers are not as above.
    """
    if not math.isfinite(shift):
        raise ValueError(f"the shift must be finite, not {shift}")
    return _pvalue(_walsh(d), len(np.asarray(d)), shift)


def _walsh(d: ArrayLike) -> np.ndarray:
    """All averages of two of n values, i <= j, in ascending order; float64 [n (n + 1) / 2]."""
    values = np.asarray(d, np.float64)
    if values.ndim != 1 or not 1 <= len(values) <= MOST_PAIRS:
        raise ValueError(f"1 to {MOST_PAIRS} numbers are needed, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("every number must be finite")
    first, second = _index_pairs(len(values))
    averages = values[first] / 2 + values[second] / 2  # halves first: the sum could overflow
    return np.sort(averages + 0.0)  # -0.0 becomes 0.0: sorting would leave the two in the order in which they came


def _middle(ordered: np.ndarray) -> float:
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low / 2 + high / 2)


def _bounds(walsh: np.ndarray, n: int, alpha: float) -> tuple[float, float]:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and 0.5, not {alpha}")
    unlikely = int(np.searchsorted(_signed_rank_cdf(n), alpha, side="right"))
    if not unlikely:
        return -math.inf, math.inf
    return float(walsh[unlikely - 1]), float(walsh[-unlikely])


def _pvalue(walsh: np.ndarray, n: int, shift: float) -> float:
    return float(_signed_rank_cdf(n)[np.searchsorted(walsh, shift, side="right")])


@functools.cache
def _index_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n)


@functools.cache
def _signed_rank_cdf(n: int) -> np.ndarray:
    """P(T <= t) for t = 0 .. n (n + 1) / 2, where T sums the ranks 1 to n that a fair coin picks; correctly rounded."""
    ways = np.zeros(n * (n + 1) // 2 + 1, object)  # Python's integers: 2**64 subsets do not fit in 64 bits
    ways[0] = 1
    for rank in range(1, n + 1):
        ways[rank:] = ways[rank:] + ways[:-rank]
    return np.array([total / 2**n for total in np.cumsum(ways)], np.float64)


# -- percentiles -------------------------------------------------------------------------------------------------------


def percentile_interval(x: ArrayLike, q: float, confidence: float = 0.95) -> tuple[float, float]:
    """Two of the values that enclose the ``q``-th percentile of the distribution they were drawn from, whichever it is.

    Each end fails with a probability of at most ``(1 - confidence) / 2``: for an upper bound alone that holds
    with 99 %, ask for 0.98.

    Args:
        x: finite numbers [n], independent draws.
        q: between 0 and 100, both excluded.
        confidence: two-sided, between 0 and 1, both excluded.

    Returns:
        lower and upper end; ``-inf`` or ``inf`` where there are too few values, as :func:`calls_needed` tells.

    Raises:
        ValueError: an argument is not as above.
    """
    values = np.sort(np.asarray(x, np.float64))
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("one or more finite numbers are needed, in one dimension")
    _check_percentile(q, confidence)
    below = _binomial_cdf(len(values), q / 100)  # P(at most k values lie under the percentile)
    miss = (1 - confidence) / 2
    lower = int(np.searchsorted(below, miss, side="right"))
    upper = int(np.searchsorted(below, 1 - miss, side="left")) + 1
    return (
        float(values[lower - 1]) if lower else -math.inf,
        float(values[upper - 1]) if upper <= len(values) else math.inf,
    )


def calls_needed(q: float, confidence: float) -> int:
    """The fewest draws of which an extreme one lies beyond the ``q``-th percentile, on its far side.

    From so many on, a one-sided bound exists: an upper one for ``q`` of 50 and more, else a lower one. It is 459 for
    the 99th percentile with 99 % confidence. An end of :func:`percentile_interval` needs ``(1 + confidence) / 2`` here.

    Args:
        q: between 0 and 100, both excluded.
        confidence: one-sided, between 0 and 1, both excluded.

    Raises:
        ValueError: an argument is not as above.
    """
    _check_percentile(q, confidence)
    inside = max(q, 100 - q) / 100
    calls = max(1, math.floor(math.log(1 - confidence) / math.log(inside)))
    while inside**calls > 1 - confidence:
        calls += 1
    return calls


def _check_percentile(q: float, confidence: float) -> None:
    if not 0 < q < 100:
        raise ValueError(f"a percentile must lie between 0 and 100, not {q}")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence must lie between 0 and 1, not {confidence}")


def _binomial_cdf(n: int, p: float) -> np.ndarray:
    """P(at most k of n succeed) for k = 0 .. n."""
    k = np.arange(1, n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n + 1 - k) / k) + math.log(p / (1 - p)))])
    weights = np.exp(logs - logs.max())  # of the likeliest count: neither end can overflow
    return np.cumsum(weights / weights.sum())


# -- the rule ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How long to look, how often, and what to accept.

    Attributes:
        max_regression: fraction by which the latency may grow.
        alpha: probability of a false FAIL in a whole run, and of a false PASS of one model; above 0 and below 0.5.
        looks: after how many pairs to look, ascending; at most 64.
        time_limit: wall time in seconds after which no further pair is begun.
        aa_share: pairs in which the baseline meets itself, as a fraction of the others, 0 to 1; none if 0.

    Raises:
        ValueError: a value is out of range, or not even the last look can decide at its share of ``alpha``.
    """

    max_regression: float = 0.05
    alpha: float = 0.01
    looks: tuple[int, ...] = (10, 14, 20, 28, 40)
    time_limit: float = 60.0
    aa_share: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "looks", tuple(self.looks))
        if not (math.isfinite(self.max_regression) and self.max_regression > 0):
            raise ValueError(f"max_regression must be above 0, not {self.max_regression}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must lie between 0 and 0.5, not {self.alpha}")
        if not (math.isfinite(self.time_limit) and self.time_limit > 0):
            raise ValueError(f"time_limit must be above 0 seconds, not {self.time_limit}")
        if not 0 <= self.aa_share <= 1:
            raise ValueError(f"aa_share must lie between 0 and 1, not {self.aa_share}")
        numbers = self.looks
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
        if not numbers or not whole or numbers[0] < 1 or numbers[-1] > MOST_PAIRS:
            raise ValueError(f"looks must be whole numbers from 1 to {MOST_PAIRS}, not {numbers}")
        if any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f"looks must ascend, not {numbers}")
        if 2.0 ** -numbers[-1] > self.level:
            raise ValueError(f"{numbers[-1]} pairs cannot decide at alpha {self.alpha} over {len(numbers)} looks")

    @property
    def level(self) -> float:
        """One-sided error probability of each look: they share ``alpha`` evenly (Bonferroni)."""
        return self.alpha / len(self.looks)

    def aa_pairs(self, pairs: int) -> int:
        """How many A/A pairs belong to a look at so many pairs: their share, but six at least, or none at all.

        With fewer than six, :func:`aa_differs` could not see a shift of two standard deviations.
        """
        return max(_AA_PAIRS, math.ceil(round(self.aa_share * pairs, 9))) if self.aa_share else 0


@dataclass(frozen=True)
class Look:
    """What the pairs of one model say at one look; logarithms of latency ratios, where not stated otherwise.

    Attributes:
        verdict: ``PASS``, ``FAIL``, or None to go on.
        reason_code: ``regression``; ``no_regression``; ``drift``, a PASS that is slower for certain but by less than
            half of what is allowed; without a verdict, and so for an INCONCLUSIVE if time ends here, ``holm`` where it
            would be a FAIL if the model had come alone, else ``time_limit``.
        estimate: Hodges-Lehmann estimate.
        low, high: its bounds, each at ``alpha``.
        alpha: one-sided error probability of either bound.
        level: what ``pvalue`` must not exceed for a FAIL; below ``alpha`` only by Holm's procedure.
        pvalue: one-sided, that the candidate is slower at all.
        n: pairs.
        detectable: a fraction, see :func:`look`.
    """

    verdict: str | None
    reason_code: str
    estimate: float
    low: float
    high: float
    alpha: float
    level: float
    pvalue: float
    n: int
    detectable: float


def look(d: ArrayLike, plan: Plan, alpha: float, level: float | None = None) -> Look:
    """Look once at the pairs of one model.

    FAIL if the candidate is slower (p-value at most ``level``, which without Holm is: lower bound above 0) and the
    estimate reaches half of what is allowed, ln(1 + max_regression / 2). Else PASS if the upper bound lies under
    ln(1 + max_regression), unless only ``level`` stood in the way of a FAIL. Else the gate goes on.

    ``detectable`` is the regression that would have been a FAIL here nine times in ten: by simulation, with a
    probability of 0.93 to 0.98 for normal differences; with heavy tails of 0.9 from 20 pairs on, below that of 0.75 at
    worst. An estimate must exceed both ``h``, half the width of the interval at ``level``, and
    ln(1 + max_regression / 2); its standard error is taken as ``h`` over the normal quantile of ``level``; the effect
    is the larger of the two plus 1.645 standard errors, as a fraction. It is ``inf`` where the pairs are too few for
    any bound.

    The levels of all looks must add up to the error allowed; it does not matter at how many pairs they are made, so a
    look at the time limit may take the place of the next one.

    Args:
        d: one number per pair, finite [n], 1 to 64 of them.
        plan: the limits.
        alpha: one-sided level of this look, usually ``plan.level``.
        level: of a FAIL, ``alpha`` by default, which it must not exceed.

    Raises:
        ValueError: the numbers or levels are not as above.
    """
    level = alpha if level is None else level
    if level > alpha:
        raise ValueError(f"the level of a FAIL must not exceed alpha, {alpha}, but is {level}")
    walsh, n = _walsh(d), len(np.asarray(d))
    estimate, pvalue = _middle(walsh), _pvalue(walsh, n, 0.0)
    low, high = _bounds(walsh, n, alpha)
    half, whole = math.log1p(plan.max_regression / 2), math.log1p(plan.max_regression)
    verdict, reason = None, "time_limit"
    if low > 0 and estimate >= half:
        verdict, reason = (FAIL, "regression") if pvalue <= level else (None, "holm")
    elif high < whole:
        verdict, reason = PASS, "drift" if low > 0 else "no_regression"
    bottom, top = _bounds(walsh, n, level)
    width = top / 2 - bottom / 2
    error = width / NormalDist().inv_cdf(1 - level)
    detectable = math.inf
    if math.isfinite(width):
        detectable = math.expm1(max(width, half) + NormalDist().inv_cdf(_POWER) * error)
    return Look(verdict, reason, estimate, low, high, alpha, level, pvalue, n, detectable)


def look_all(
    differences: Mapping[str, ArrayLike], plan: Plan, *, failed: Collection[str] = (), total: int
) -> dict[str, Look]:
    """Look once at every check that is still undecided; false FAILs are controlled over all of them together.

    Holm's procedure with several looks (Ye et al. 2013): a FAIL needs the level of a look divided by the number of
    checks that have not failed, those that passed included; every FAIL therefore eases the next, also within one look.
    Why the run has at most ``alpha``: before the first false FAIL only true ones happened, so its level was at most
    that of a look over the number of checks without a regression; add up over these checks and over the looks.
    A PASS needs the plain level: it is a statement about one model.

    Args:
        differences: by check, one number per pair; the number of pairs may differ.
        plan: the limits.
        failed: the checks that failed at an earlier look.
        total: all checks of the run, also those that have passed.

    Returns:
        what each says, in the order of ``differences``.

    Raises:
        ValueError: a check is both undecided and failed, ``total`` is too small, or the numbers are bad.
    """
    done = set(failed)
    both = sorted(done & differences.keys())
    if both:
        raise ValueError(f"{both[0]!r} has failed already")
    if total < len(done) + len(differences):
        raise ValueError(f"{len(done) + len(differences)} checks are given, but the run is said to have {total}")
    found: dict[str, Look] = {}
    while True:
        level = plan.level / (total - len(done)) if total > len(done) else plan.level
        found |= {name: look(d, plan, plan.level, level) for name, d in differences.items() if name not in done}
        fresh = {name for name, one in found.items() if one.verdict == FAIL} - done
        if not fresh:
            return found
        done |= fresh


# -- the machine -------------------------------------------------------------------------------------------------------


def aa_differs(d_aa: ArrayLike, d: ArrayLike, alpha: float) -> bool:
    """Whether pairs of the baseline with itself betray a machine on which equal models differ.

    A few A/A pairs say little alone, so they are ranked among the pairs of the comparison: by magnitude, in one list
    with the distances of ``d`` from its Hodges-Lehmann estimate. The statistic is the sum of the A/A pairs' ranks with
    the signs of their values. On a sound machine the ranks are a random choice and the signs fair coins, whatever the
    distribution, which gives the null distribution exactly, but for one thing: an estimated centre lies too close to
    its sample. The distances are therefore stretched by n / (n - 1), by simulation enough for at most ``alpha``. Ties
    and zeros are resolved against a difference.

    Call it once in a run, with the verdict: ``alpha`` is spent by every call. With six A/A pairs beside ten others, a
    shift of two standard deviations is seen nine times in ten at 1 %.

    Args:
        d_aa: one number per A/A pair, finite [k].
        d: one number per pair of candidate and baseline, finite [n], 2 to 64 of them.
        alpha: two-sided probability of a false alarm, above 0 and below 1.

    Raises:
        ValueError: the numbers are not as above, or so few that nothing could be found at ``alpha``.
    """
    same, others = np.asarray(d_aa, np.float64), np.asarray(d, np.float64)
    centre, n, k = hodges_lehmann(others), len(others), same.size
    if same.ndim != 1 or not 1 <= k <= MOST_PAIRS or n < 2 or not np.isfinite(same).all():
        raise ValueError(f"1 to {MOST_PAIRS} finite A/A numbers and 2 others are needed")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    tail = _signed_choice_tail(k, n + k)
    if tail[-1] > alpha:
        raise ValueError(f"{k} A/A pairs beside {n} others cannot show a difference at alpha {alpha}")
    size = np.abs(same)
    pool = np.sort(np.concatenate([size, np.abs(others - centre) * (n / (n - 1))]))
    least = np.searchsorted(pool, size, side="left") + 1
    most = np.searchsorted(pool, size, side="right")
    lowest = int(np.where(same > 0, least, -most).sum())
    highest = int(np.where(same < 0, -least, most).sum())
    return bool(tail[max(lowest, -highest, 0)] <= alpha)


@functools.cache
def _signed_choice_tail(k: int, n: int) -> np.ndarray:
    """P(|V| >= v) for v = 0 .. largest, where V sums k of the ranks 1 to n, chosen at random, with random signs."""
    largest = k * n - k * (k - 1) // 2
    ways = np.zeros((k + 1, 2 * largest + 1))  # [how many are chosen, sum + largest]; probabilities up to a factor
    ways[0, largest] = 1.0
    for rank in range(1, n + 1):
        chosen = np.zeros_like(ways)
        chosen[1:, rank:] += ways[:-1, :-rank]
        chosen[1:, :-rank] += ways[:-1, rank:]
        ways += chosen
    halves = ways[k, largest:] / ways[k].sum()
    halves[1:] *= 2
    return np.cumsum(halves[::-1])[::-1]
