"""The gate's statistics: against scipy, closed forms and enumeration, and the whole rule on synthetic pairs."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgecompile import sequential
from edgecompile.sequential import (
    Look,
    Plan,
    aa_differs,
    calls_needed,
    hodges_lehmann,
    look,
    look_all,
    percentile_interval,
    signed_rank_bounds,
    signed_rank_pvalue,
)
from edgecompile.verdict import FAIL, PASS

PLAN = Plan()
HALF, WHOLE = math.log1p(0.025), math.log1p(0.05)

samples = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=30)
tied = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)
levels = st.floats(1e-4, 0.4)
relaxed = settings(deadline=None, max_examples=60)


def normal(n: int, seed: int = 0, sd: float = 0.01, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, sd, n)


# -- signed ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8, 10, 25, 40, 64])
@pytest.mark.parametrize("shift", [-0.004, 0.0, 0.003])
def test_pvalue_is_scipys_exact_one(n, shift):
    d = normal(n, n)
    expected = stats.wilcoxon(d - shift, alternative="greater", method="exact").pvalue
    assert signed_rank_pvalue(d, shift) == pytest.approx(expected, rel=1e-10)
    other = stats.wilcoxon(d - shift, alternative="less", method="exact").pvalue
    assert n < 2 or abs(signed_rank_pvalue(d, shift) - other) > 1e-6, "the two sides must not be confused"


@pytest.mark.parametrize("n", [1, 8, 10, 40, 64])
def test_smallest_and_largest_pvalue(n):
    assert signed_rank_pvalue(np.arange(1.0, n + 1)) == 0.5**n
    assert signed_rank_pvalue(-np.arange(1.0, n + 1)) == 1.0


def test_null_distribution_by_enumeration_and_exactly_at_64():
    for n in (1, 4, 9):
        sums = [sum(r for r, up in enumerate(ups, 1) if up) for ups in itertools.product((0, 1), repeat=n)]
        counted = np.cumsum(np.bincount(sums)) / 2**n
        assert np.array_equal(sequential._signed_rank_cdf(n), counted)
    cdf = sequential._signed_rank_cdf(64)
    assert len(cdf) == 64 * 65 // 2 + 1 and cdf[-1] == 1.0
    assert list(cdf[:5] * 2.0**64) == [1, 2, 3, 5, 7]  # partitions into distinct parts: 1, 1, 1, 2, 2


def test_eight_pairs_cannot_decide_where_ten_can():
    assert signed_rank_pvalue(np.arange(1.0, 9)) == 1 / 256 > PLAN.level > 1 / 1024
    assert signed_rank_bounds(normal(8), PLAN.level) == (-math.inf, math.inf)
    low, high = signed_rank_bounds(normal(10), PLAN.level)
    assert math.isfinite(low) and math.isfinite(high)
    assert math.isfinite(signed_rank_bounds(normal(8), 1 / 256)[0])
    assert signed_rank_bounds(normal(8), np.nextafter(1 / 256, 0))[0] == -math.inf


@pytest.mark.parametrize("n", [10, 14, 28, 40])
@pytest.mark.parametrize("alpha", [0.002, 0.0251, 0.2])
def test_bounds_are_where_scipys_test_turns(n, alpha):
    d = normal(n, 3)
    low, high = signed_rank_bounds(d, alpha)

    def rejects(shift: float, side: str) -> bool:
        return stats.wilcoxon(d - shift, alternative=side, method="exact").pvalue <= alpha

    assert rejects(low - 1e-12, "greater") and not rejects(low + 1e-12, "greater")
    assert rejects(high + 1e-12, "less") and not rejects(high - 1e-12, "less")


def test_hodges_lehmann_by_hand():
    assert hodges_lehmann([3.0]) == 3.0
    assert hodges_lehmann([1.0, 2.0]) == 1.5
    assert hodges_lehmann([0.0, 1.0, 5.0]) == 1.75  # of 0, .5, 1, 2.5, 3, 5
    assert hodges_lehmann([0.0, 1.0, 5.0]) not in (np.mean([0, 1, 5]), np.median([0, 1, 5]))
    assert hodges_lehmann([1e308, 1e308]) == 1e308


def test_one_outlier_hardly_moves_the_estimate_but_does_move_the_mean():
    d = normal(20)
    spoilt = [*d[:-1], 50.0]
    assert abs(hodges_lehmann(spoilt) - hodges_lehmann(d)) < 0.005 < abs(np.mean(spoilt) - np.mean(d))


@relaxed
@given(tied, levels)
def test_bounds_and_pvalue_agree_even_with_ties_and_zeros(d, alpha):
    low, high = signed_rank_bounds(d, alpha)
    for shift in (*d, 0.0, 0.5, -0.25):
        assert (signed_rank_pvalue(d, shift) <= alpha) == (low > shift)
        assert (signed_rank_pvalue(np.negative(d), -shift) <= alpha) == (high < shift)


@relaxed
@given(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=8))
def test_zeros_and_ties_never_make_the_test_too_bold(sizes):
    signs = itertools.product((-1, 1), repeat=len(sizes))
    found = np.sort([signed_rank_pvalue(np.multiply(sizes, s)) for s in signs])
    share = np.searchsorted(found, found, side="right") / len(
        found
    )  # how often a p-value is as small, if signs are fair
    assert (share <= found + 1e-12).all()


def test_a_bold_treatment_of_zeros_would_be_noticed():
    zeros = np.zeros(10)
    assert signed_rank_pvalue(zeros) == 1.0
    assert signed_rank_pvalue(zeros + 1e-9) == 1 / 1024

    def untied(last: float) -> float:
        return stats.wilcoxon([*range(1, 10), last], alternative="greater", method="exact").pvalue

    assert signed_rank_pvalue([*range(1, 10), -9.0]) == pytest.approx(untied(-9.01))
    assert untied(-8.99) < untied(-9.01)


@relaxed
@given(samples, levels, st.floats(-2, 2))
def test_shift_and_sign_and_order(d, alpha, shift):
    low, high = signed_rank_bounds(d, alpha)
    assert low <= hodges_lehmann(d) <= high
    moved = np.add(d, shift)
    assert hodges_lehmann(moved) == pytest.approx(hodges_lehmann(d) + shift, abs=1e-12)
    assert signed_rank_bounds(moved, alpha) == pytest.approx((low + shift, high + shift), abs=1e-12)
    assert signed_rank_bounds(np.negative(d), alpha) == (-high, -low)
    assert hodges_lehmann(np.negative(d)) == -hodges_lehmann(d)
    assert signed_rank_bounds(sorted(d), alpha) == signed_rank_bounds(d[::-1], alpha) == (low, high)
    assert hodges_lehmann(sorted(d)) == hodges_lehmann(d)


@relaxed
@given(samples, levels, levels)
def test_a_smaller_alpha_never_narrows_the_bounds(d, one, two):
    wide, narrow = (signed_rank_bounds(d, alpha) for alpha in sorted((one, two)))
    assert wide[0] <= narrow[0] and narrow[1] <= wide[1]


def test_bounds_do_depend_on_alpha():
    assert signed_rank_bounds(normal(20), 0.001)[0] < signed_rank_bounds(normal(20), 0.1)[0]


def test_bounds_cover_the_centre_as_often_as_they_say():
    draws = np.random.default_rng(5).laplace(0, 1, (4000, 12))
    found = [signed_rank_bounds(d, 0.05) for d in draws]
    misses = np.mean([low > 0 for low, _ in found]), np.mean([high < 0 for _, high in found])
    actual = float(max(p for p in sequential._signed_rank_cdf(12) if p <= 0.05))
    assert misses == (pytest.approx(actual, abs=0.012), pytest.approx(actual, abs=0.012))
    assert np.mean([low > 0.5 for low, _ in found]) < 0.005 < np.mean([low > -0.5 for low, _ in found])


@pytest.mark.parametrize("bad", [[], [[1.0, 2.0]], [math.nan], [1.0, math.inf], np.zeros(65), 3.0])
def test_what_is_not_a_sample_is_refused(bad):
    for function in (hodges_lehmann, signed_rank_pvalue, lambda d: signed_rank_bounds(d, 0.1)):
        with pytest.raises(ValueError):
            function(bad)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 1.0, math.nan])
def test_a_level_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        signed_rank_bounds([1.0, 2.0], alpha)
    with pytest.raises(ValueError, match="alpha"):
        look(normal(10), PLAN, alpha)


@pytest.mark.parametrize("shift", [math.nan, math.inf])
def test_a_shift_must_be_finite(shift):
    with pytest.raises(ValueError, match="shift"):
        signed_rank_pvalue([1.0, 2.0], shift)


# -- percentiles -------------------------------------------------------------------------------------------------------


def test_calls_needed_in_closed_form():
    assert calls_needed(99, 0.99) == 459 and calls_needed(99, 0.95) == 299
    assert calls_needed(99.9, 0.95) == 2995 and calls_needed(99.9, 0.99) == 4603
    assert calls_needed(50, 1 - 0.5**5) == 5 and calls_needed(50, 1 - 0.5**5 + 1e-12) == 6
    assert calls_needed(1, 0.99) == 459  # the least of so many lies under the first percentile


@pytest.mark.parametrize("q, n", [(99, 459), (99, 299), (50, 5), (90, 100), (25, 40), (1, 500), (99.9, 20_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.98])
def test_ranks_are_those_of_the_binomial_distribution(q, n, confidence):
    low, high = percentile_interval(np.arange(1, n + 1), q, confidence)
    miss = (1 - confidence) / 2
    rank_low = 0 if low == -math.inf else int(low)
    rank_high = n + 1 if high == math.inf else int(high)
    law = stats.binom(n, q / 100)  # values under the percentile
    assert law.cdf(rank_low - 1) <= miss < law.cdf(rank_low)  # and the next rank would miss too often
    assert law.sf(rank_high - 1) <= miss < law.sf(rank_high - 2)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.98])
@pytest.mark.parametrize("q", [75, 90, 99])
def test_the_upper_end_exists_from_calls_needed_on(q, confidence):
    needed = calls_needed(q, (1 + confidence) / 2)
    assert percentile_interval(np.arange(needed), q, confidence)[1] == needed - 1
    assert percentile_interval(np.arange(needed - 1), q, confidence)[1] == math.inf
    assert percentile_interval(np.arange(needed - 1), 100 - q, confidence)[0] == -math.inf


def test_coverage_of_a_skewed_distribution():
    draws = np.random.default_rng(1).exponential(size=(2000, 300))
    truth = -math.log(0.1)
    found = np.array([percentile_interval(x, 90) for x in draws])
    missed = np.mean((truth < found[:, 0]) | (truth > found[:, 1]))
    assert 0.02 < missed <= 0.055
    wrong = -math.log(0.2)
    assert np.mean((wrong < found[:, 0]) | (wrong > found[:, 1])) > 0.9


def test_a_long_sample_neither_overflows_nor_underflows():
    low, high = percentile_interval(np.arange(1_000_000), 50)
    assert 499_000 < low < 500_000 < high < 501_000
    assert (low, high) == pytest.approx(np.array(stats.binom(1_000_000, 0.5).ppf([0.025, 0.975])), abs=2)


@pytest.mark.parametrize("x", [[], [[1.0]], [math.nan, 1.0], [math.inf]])
def test_a_percentile_needs_finite_numbers(x):
    with pytest.raises(ValueError, match="finite numbers"):
        percentile_interval(x, 50)


@pytest.mark.parametrize("q, confidence", [(0, 0.9), (100, 0.9), (-1, 0.9), (math.nan, 0.9), (50, 0), (50, 1)])
def test_a_percentile_out_of_range_is_refused(q, confidence):
    with pytest.raises(ValueError):
        percentile_interval([1.0, 2.0], q, confidence)
    with pytest.raises(ValueError):
        calls_needed(q, confidence)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_the_plan_by_default():
    assert (PLAN.max_regression, PLAN.alpha, PLAN.looks) == (0.05, 0.01, (10, 14, 20, 28, 40))
    assert (PLAN.time_limit, PLAN.aa_share) == (60.0, 0.1)
    assert PLAN.level == pytest.approx(0.002)
    assert [PLAN.aa_pairs(n) for n in (10, 40, 60)] == [6, 6, 6]
    assert [replace(PLAN, aa_share=0.3).aa_pairs(n) for n in (10, 20, 30, 40)] == [6, 6, 9, 12]
    assert replace(PLAN, aa_share=0).aa_pairs(40) == 0
    assert Plan(looks=[10, 20]).looks == (10, 20)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        PLAN.alpha = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "change, named",
    [
        *(({"max_regression": v}, "max_regression") for v in (0, -0.05, math.nan, math.inf)),
        *(({"alpha": v}, "alpha") for v in (0, 0.5, 1, -1, math.nan)),
        *(({"time_limit": v}, "time_limit") for v in (0, -1, math.inf, math.nan)),
        *(({"aa_share": v}, "aa_share") for v in (-0.1, 1.1, math.nan)),
        *(({"looks": v}, "looks") for v in ((), (0, 10), (10, 10), (20, 10), (10, 65), (10.0, 20), (True, 20))),
        ({"looks": (4, 6)}, "cannot decide"),
        ({"alpha": 1e-13}, "cannot decide"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change, named):
    with pytest.raises(ValueError, match=named):
        replace(PLAN, **change)


# -- one look ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shift, sd, verdict, reason",
    [
        (0.0, 0.005, PASS, "no_regression"),
        (-0.10, 0.005, PASS, "no_regression"),
        (0.012, 0.002, PASS, "drift"),
        (0.035, 0.002, FAIL, "regression"),  # also surely under 5 %: FAIL comes first
        (0.06, 0.01, FAIL, "regression"),
        (0.03, 0.06, None, "time_limit"),
    ],
)
def test_verdicts_and_their_reasons(shift, sd, verdict, reason):
    one = look(normal(14, 2, sd, shift), PLAN, PLAN.level)
    assert (one.verdict, one.reason_code) == (verdict, reason)


def test_a_look_reports_what_the_functions_compute():
    d = normal(14, 4, 0.02, 0.01)
    one = look(d, PLAN, 0.002, 0.001)
    assert (one.low, one.high) == signed_rank_bounds(d, 0.002)
    assert (one.estimate, one.pvalue) == (hodges_lehmann(d), signed_rank_pvalue(d))
    assert (one.alpha, one.level, one.n) == (0.002, 0.001, 14)


def test_half_of_what_is_allowed_is_a_fail_and_a_hair_less_is_not():
    assert look(np.full(10, HALF), PLAN, PLAN.level).verdict == FAIL
    under = look(np.full(10, np.nextafter(HALF, 0)), PLAN, PLAN.level)
    assert (under.verdict, under.reason_code) == (PASS, "drift")


def test_an_upper_bound_at_the_limit_is_no_pass_and_a_hair_less_is():
    at = [-0.01] * 8 + [WHOLE] * 2
    assert look(at, PLAN, PLAN.level).high == WHOLE
    assert look(at, PLAN, PLAN.level).verdict is None
    assert look([-0.01] * 8 + [float(np.nextafter(WHOLE, 0))] * 2, PLAN, PLAN.level).verdict == PASS


def test_few_pairs_decide_nothing():
    one = look(normal(8, sd=1e-4), PLAN, PLAN.level)
    assert (one.verdict, one.low, one.high, one.detectable) == (None, -math.inf, math.inf, math.inf)
    assert look(normal(10, sd=1e-4), PLAN, PLAN.level).verdict == PASS


def test_a_level_above_alpha_is_refused():
    with pytest.raises(ValueError, match="level"):
        look(normal(10), PLAN, 0.002, 0.01)


@relaxed
@given(st.lists(st.floats(-0.2, 0.2), min_size=10, max_size=40), st.randoms(use_true_random=False))
def test_the_same_numbers_in_any_order_give_the_same_look_bit_for_bit(d, random):
    first = look(d, PLAN, PLAN.level)
    shuffled = list(d)
    random.shuffle(shuffled)
    sequential._signed_rank_cdf.cache_clear()
    assert repr(look(shuffled, PLAN, PLAN.level)) == repr(first)
    assert look(np.add(d, 1e-3), PLAN, PLAN.level) != first


@pytest.mark.parametrize(
    "shape, n, sd",
    [("normal", 10, 0.006), ("normal", 10, 0.025), ("normal", 14, 0.025), ("normal", 40, 0.06),
     ("laplace", 20, 0.025), ("laplace", 40, 0.06), ("outliers", 20, 0.025), ("outliers", 40, 0.06)],
)  # fmt: skip
def test_the_detectable_effect_is_detected_nine_times_in_ten(shape, n, sd):
    draws = pairs(shape, sd, (1500, n), n)
    effect = math.log1p(np.median([look(d, PLAN, PLAN.level).detectable for d in draws[:500]]))

    def detected(shift: float) -> float:
        return float(np.mean([look(d, PLAN, PLAN.level).verdict == FAIL for d in draws[500:] + shift]))

    assert 0.89 <= detected(effect) < 1
    assert detected(effect / 2) < 0.6


def test_the_sign_of_a_zero_leaves_no_trace():
    zeros = [0.0, -0.0] * 6
    assert repr(look(zeros, PLAN, PLAN.level)) == repr(look(zeros[::-1], PLAN, PLAN.level))
    assert "-0.0," not in repr(look(np.full(12, -0.0), PLAN, PLAN.level))


# -- several models ----------------------------------------------------------------------------------------------------

CERTAIN = np.arange(1.0, 11) / 100  # ten pairs, all slower: p = 1/1024, under the level of a look but not under half
FAINT = 0.03 + np.arange(10) * 1e-5  # as certain
SURE = 0.04 + np.arange(20) * 1e-4  # twenty pairs: p = 2**-20


def test_what_fails_alone_goes_on_in_company():
    assert look(CERTAIN, PLAN, PLAN.level).verdict == FAIL
    alone = look_all({"a": CERTAIN}, PLAN, total=1)["a"]
    assert alone == look(CERTAIN, PLAN, PLAN.level)
    for total, level in ((3, PLAN.level / 3), (4, PLAN.level / 4)):
        one = look_all({"a": CERTAIN}, PLAN, total=total)["a"]
        assert (one.verdict, one.reason_code, one.level) == (None, "holm", level)
        assert one.alpha == PLAN.level and one.low > 0


def test_faint_but_undecided_is_not_passed_by_holm():
    assert look(FAINT, PLAN, PLAN.level).high < WHOLE  # would be a PASS if a FAIL did not come first
    one = look_all({"a": FAINT}, PLAN, total=3)["a"]
    assert (one.verdict, one.reason_code) == (None, "holm")


def test_a_fail_eases_the_next_in_the_same_look():
    found = look_all({"a": CERTAIN, "b": SURE, "c": SURE + 0.01}, PLAN, total=3)
    assert list(found) == ["a", "b", "c"]
    assert {name: one.verdict for name, one in found.items()} == {"a": FAIL, "b": FAIL, "c": FAIL}
    assert found["a"].level == PLAN.level and found["b"].level == PLAN.level / 3
    passing = look_all({"a": CERTAIN, "b": -SURE, "c": SURE}, PLAN, total=4)
    assert [one.verdict for one in passing.values()] == [None, PASS, FAIL]
    assert passing["a"].reason_code == "holm" and passing["a"].level == PLAN.level / 3


def test_earlier_fails_count_and_earlier_passes_do_not():
    assert look_all({"a": CERTAIN}, PLAN, failed={"b", "c"}, total=3)["a"].verdict == FAIL
    assert look_all({"a": CERTAIN}, PLAN, failed=["b"], total=4)["a"].verdict is None
    assert look_all({}, PLAN, failed={"a"}, total=1) == {}


def test_a_pass_needs_no_more_in_company():
    quiet = normal(10, sd=0.01)
    assert look_all({"a": quiet}, PLAN, total=50)["a"].verdict == PASS
    assert look_all({"a": quiet}, PLAN, total=50)["a"].high == look(quiet, PLAN, PLAN.level).high


def test_the_order_of_models_does_not_matter():
    given_ = {"a": CERTAIN, "b": SURE, "c": normal(14)}
    turned = dict(reversed(given_.items()))
    assert look_all(given_, PLAN, total=3) == look_all(turned, PLAN, total=3)


def test_a_wrong_count_is_refused():
    with pytest.raises(ValueError, match="failed already"):
        look_all({"a": CERTAIN}, PLAN, failed={"a"}, total=2)
    with pytest.raises(ValueError, match="2 checks"):
        look_all({"a": CERTAIN}, PLAN, failed={"b"}, total=1)


def test_holm_controls_false_fails_over_all_models():
    plan = Plan(max_regression=1e-9, alpha=0.05, looks=(10, 20))  # so small a limit that only the tests decide
    rng = np.random.default_rng(11)
    models, runs, with_holm, alone = 6, 600, 0, 0
    for _ in range(runs):
        pairs = {str(m): rng.normal(0, 1, 20) for m in range(models)}
        pairs["0"] = pairs["0"] + 1.5  # one true regression, which must not help the others too much
        failed: set[str] = set()
        for n in plan.looks:
            found = look_all({m: d[:n] for m, d in pairs.items() if m not in failed}, plan, failed=failed, total=models)
            failed |= {m for m, one in found.items() if one.verdict == FAIL}
        with_holm += bool(failed - {"0"})
        alone += any(look(d[:n], plan, plan.level).verdict == FAIL
                     for m, d in pairs.items() if m != "0" for n in plan.looks)  # fmt: skip
    assert with_holm / runs <= 0.05 < 0.1 < alone / runs


# -- the whole rule ----------------------------------------------------------------------------------------------------

SHAPES = ("normal", "laplace", "outliers")
SPREADS = (0.006, 0.025)  # standard deviation of A/A pairs: a quiet small model, a noisy large one


def pairs(shape: str, sd: float, count: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, SHAPES.index(shape), round(sd * 1e4)])  # no two scenarios share their draws
    if shape == "laplace":
        return rng.laplace(0, sd / math.sqrt(2), count)
    drawn = rng.normal(0, sd, count)
    return np.where(rng.random(count) < 0.05, 10 * drawn, drawn) if shape == "outliers" else drawn


def gate(d: np.ndarray, plan: Plan = PLAN) -> Look:
    found = [look(d[: plan.looks[0]], plan, plan.level)]
    for n in plan.looks[1:]:
        if found[-1].verdict is not None:
            break
        found.append(look(d[:n], plan, plan.level))
    return found[-1]


def shares(runs: list[Look]) -> dict[str | None, float]:
    return {v: sum(one.verdict == v for one in runs) / len(runs) for v in (PASS, FAIL, None)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sd", SPREADS)
def test_equal_models_pass_and_their_machine_is_trusted(shape, sd):
    d, aa = pairs(shape, sd, (3000, 40), 21), pairs(shape, sd, (3000, 6), 22)
    runs = [gate(one) for one in d]
    found = shares(runs)
    assert found[FAIL] <= 0.01 and found[None] <= 0.02
    alarms = np.mean([aa_differs(a, b[: one.n], 0.01) for a, b, one in zip(aa, d, runs, strict=True)])
    assert 0.002 < alarms <= 0.0135  # 1 % and two standard errors; see the pooled figure below
    assert found[None] + alarms <= 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sd", SPREADS)
def test_a_regression_of_five_and_a_half_percent_fails(shape, sd):
    found = shares([gate(one) for one in pairs(shape, sd, (1000, 40), 31) + math.log1p(0.054)])
    assert found[FAIL] >= 0.95 and found[PASS] <= 0.01
    faster = shares([gate(one) for one in pairs(shape, sd, (1000, 40), 32) - math.log1p(0.054)])
    assert faster[FAIL] == 0 and faster[PASS] >= 0.95


def test_looking_often_at_the_full_level_would_cry_wolf():
    plan = Plan(max_regression=1e-9, alpha=0.05)
    noise = pairs("normal", 1.0, (1000, 40), 41)
    greedy = np.mean([any(signed_rank_pvalue(d[:n]) <= plan.alpha for n in plan.looks) for d in noise])
    honest = np.mean([any(signed_rank_pvalue(d[:n]) <= plan.level for n in plan.looks) for d in noise])
    assert honest <= plan.alpha < 0.08 < greedy


# -- the machine -------------------------------------------------------------------------------------------------------


def test_null_distribution_of_the_signed_choice_by_enumeration():
    for k, n in ((1, 3), (2, 5), (3, 6)):
        sums = [
            abs(sum(r * s for r, s in zip(ranks, signs, strict=True)))
            for ranks in itertools.combinations(range(1, n + 1), k)
            for signs in itertools.product((-1, 1), repeat=k)
        ]
        expected = [np.mean(np.array(sums) >= v) for v in range(max(sums) + 1)]
        assert sequential._signed_choice_tail(k, n) == pytest.approx(np.array(expected))


def test_false_alarms_over_many_distributions():
    alarms = []
    for seed, (shape, n) in enumerate(itertools.product(SHAPES, (10, 14, 40))):
        d, aa = pairs(shape, 0.02, (4000, n), 50 + seed), pairs(shape, 0.02, (4000, 6), 70 + seed)
        alarms += [aa_differs(a, b + 0.03, 0.01) for a, b in zip(aa, d, strict=True)]  # a slower candidate is no matter
    assert 0.006 < np.mean(alarms) <= 0.01


@pytest.mark.parametrize(
    "shape, sd, power",
    [("normal", 0.006, 0.99), ("laplace", 0.006, 0.99), ("outliers", 0.006, 0.94),
     ("normal", 0.025, 0.90), ("laplace", 0.025, 0.88), ("outliers", 0.025, 0.75)],
)  # fmt: skip
@pytest.mark.parametrize("n", [10, 40])
def test_a_shift_of_five_percent_betrays_the_machine(shape, sd, power, n):
    d, aa = pairs(shape, sd, (500, n), 81), pairs(shape, sd, (500, 6), 82)
    for shift in (0.05, -0.05):
        assert np.mean([aa_differs(a + shift, b, 0.01) for a, b in zip(aa, d, strict=True)]) >= power
    assert np.mean([aa_differs(a, b + 0.05, 0.01) for a, b in zip(aa, d, strict=True)]) <= 0.03


def test_ties_and_zeros_speak_for_the_machine():
    assert not aa_differs(np.zeros(6), np.zeros(10), 0.01)
    assert not aa_differs(np.zeros(6), normal(10), 0.01)
    assert not aa_differs([0.05, -0.05] * 3, np.zeros(10), 0.01)
    assert not aa_differs(np.full(6, 0.05), np.resize([0.0, 0.1], 10), 0.01)
    assert aa_differs(np.full(6, 0.05), np.zeros(10), 0.01)


@relaxed
@given(st.lists(st.floats(-0.1, 0.1), min_size=6, max_size=8), st.randoms(use_true_random=False))
def test_the_machine_test_knows_neither_order_nor_side(aa, random):
    d = normal(12, 9, 0.02)
    shuffled = list(aa)
    random.shuffle(shuffled)
    assert aa_differs(aa, d, 0.05) == aa_differs(shuffled, d[::-1], 0.05) == aa_differs(np.negative(aa), -d, 0.05)


def test_too_few_pairs_to_tell_are_refused():
    with pytest.raises(ValueError, match="cannot show"):
        aa_differs([0.5], normal(10), 0.01)
    assert not aa_differs([0.0, 0.0], normal(10), 0.01)  # two are enough to tell, if barely
    for same, others in (([], normal(10)), ([math.nan] * 6, normal(10)), (np.zeros(6), [0.1])):
        with pytest.raises(ValueError, match="numbers"):
            aa_differs(same, others, 0.01)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            aa_differs(np.zeros(6), normal(10), alpha)


# -- a board -----------------------------------------------------------------------------------------------------------


def test_the_module_needs_numpy_only():
    code = (
        "import sys, edgecompile.sequential;"
        "print(sorted({'scipy', 'onnx', 'torch', 'click', 'numpy'} & {m.partition('.')[0] for m in sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['numpy']"
