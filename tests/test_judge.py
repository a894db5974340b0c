"""The verdict from recorded evidence: each rule fires and does not fire, and a replay is the same computation."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from edgecompile import judge
from edgecompile.errors import InputError
from edgecompile.judge import ANCHOR, BASELINE, CANDIDATE, Facts, Recorder, Settings, Subject
from edgecompile.measure import Samples
from edgecompile.sequential import Plan
from edgecompile.verdict import FAIL, INCONCLUSIVE, PASS

CALLS, ROUNDS = 60, 10


class Machine:
    """Sessions with known latencies: a factor per arm, scatter between sessions and within."""

    def __init__(self, seed=0, scatter=0.01, void="", **factors):
        self.rng, self.scatter, self.factors, self.void = np.random.default_rng(seed), scatter, factors, void
        self.opened: list[tuple[str, ...]] = []

    def __call__(self, arms, seed):
        self.opened.append(tuple(arms))
        samples = {}
        for label, arm in arms.items():
            session = self.factors.get(label, self.factors.get(arm, 1.0)) * math.exp(self.rng.normal(0, self.scatter))
            calls = 1e-3 * session * (1 + np.abs(self.rng.normal(0, 0.02, CALLS)))
            samples[label] = Samples(label, "thread_cpu", calls, 1, np.repeat(np.arange(ROUNDS), CALLS // ROUNDS))
        return samples, self.void


def subject(name="m", arms=(CANDIDATE, BASELINE), **facts) -> Subject:
    return Subject(Facts(name, {"y": 1e-6}, "the baseline", arms=arms, **facts))


def judged(machine, subjects=None, settings=None):
    settings = settings or Settings()
    subjects = subjects or [subject()]
    recorders = {s.name: Recorder(s, machine, settings.plan) for s in subjects}
    checks = judge.judge(subjects, settings, lambda s, n: recorders[s.name](n))
    again = judge.judge([Subject(s.facts, s.pairs, s.again) for s in subjects], settings)
    assert again == checks, "a replay must not differ"
    return {c.id: c for c in checks}


# -- latency -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "verdict", "code"),
    [
        (1.0, PASS, "no_regression"),
        (0.8, PASS, "no_regression"),
        (1.015, PASS, "drift"),
        (1.08, FAIL, "regression"),
        (2.0, FAIL, "regression"),
    ],
)
def test_verdict_follows_the_latency(candidate, verdict, code):
    found = judged(Machine(candidate=candidate, scatter=0.003))["m/latency"]
    assert (found.verdict, found.reason_code) == (verdict, code)
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(candidate, rel=0.01)
    assert found.pairs == 10 and found.budget == 0.05 and found.clock == "thread_cpu"
    assert found.baseline == pytest.approx(1e-3, rel=0.05)


def test_a_noisy_machine_is_looked_at_longer_and_then_is_inconclusive():
    found = judged(Machine(candidate=1.03, scatter=0.3))["m/latency"]
    assert (found.verdict, found.reason_code, found.pairs) == (INCONCLUSIVE, "time_limit", 40)
    assert 0.1 < found.detectable < 1
    assert judged(Machine(candidate=1.0, scatter=0.04))["m/latency"].verdict == PASS


def test_time_runs_out_before_the_first_look():
    found = judged(Machine(), settings=Settings(Plan(time_limit=1e-9)))["m/latency"]
    assert (found.verdict, found.reason_code, found.pairs) == (INCONCLUSIVE, "time_limit", 1)
    assert found.detectable == math.inf and found.estimate is None


def test_a_limit_of_20_percent_lets_10_through():
    machine = Machine(candidate=1.1, scatter=0.003)
    assert judged(machine)["m/latency"].verdict == FAIL
    found = judged(machine, settings=Settings(Plan(max_regression=0.25)))["m/latency"]
    assert (found.verdict, found.reason_code) == (PASS, "drift")


def test_a_machine_on_which_the_baseline_differs_from_itself_is_not_believed():
    for candidate in (1.0, 1.3):
        found = judged(Machine(candidate=candidate, again=1.1))["m/latency"]
        assert (found.verdict, found.reason_code) == (INCONCLUSIVE, "aa_differs")
    assert judged(Machine(again=1.0))["m/latency"].verdict == PASS


def test_a_difference_that_no_verdict_depends_on_is_forgiven():
    quiet = {"scatter": 0.0005, "again": 1.006}  # certain, but a tenth of what is allowed
    assert judged(Machine(**quiet))["m/latency"].verdict == PASS
    strict = Settings(Plan(max_regression=0.01))
    assert judged(Machine(**quiet), settings=strict)["m/latency"].reason_code == "aa_differs"


def test_the_baseline_meets_itself_among_the_pairs_not_after_them():
    machine = Machine()
    judged(machine)
    kinds = [("again" in arms) for arms in machine.opened]
    assert sum(kinds) == 6 and len(kinds) == 16
    assert any(kinds[:3]) and not kinds[-1]


def test_disturbed_pairs_are_left_out_and_many_of_them_spoil_the_run():
    class Throttling(Machine):
        def __call__(self, arms, seed):
            samples, _ = super().__call__(arms, seed)
            return samples, "the GPU clock fell" if len(self.opened) % every == 0 else ""

    every = 2
    found = judged(Throttling())["m/latency"]
    assert (found.verdict, found.reason_code) == (INCONCLUSIVE, "throttled")
    assert "the GPU clock fell" in found.reason
    every = 9
    assert judged(Throttling())["m/latency"].verdict == PASS


def test_nothing_but_disturbed_pairs():
    found = judged(Machine(void="too hot"), settings=Settings(Plan(time_limit=0.05)))["m/latency"]
    assert (found.verdict, found.reason_code, found.pairs) == (INCONCLUSIVE, "throttled", 0)


def test_ten_small_steps_do_not_slip_past_the_release_anchor():
    caught = None
    for step in range(1, 11):
        last, now = 1.02 ** (step - 1), 1.02**step
        machine = Machine(seed=step, scatter=0.003, baseline=last, candidate=now)
        found = judged(machine, [subject(arms=(CANDIDATE, BASELINE, ANCHOR))])
        assert found["m/latency"].verdict == PASS
        if found["m/latency_anchor"].verdict == FAIL:
            caught = step
            break
    assert caught in (2, 3)


def test_many_models_are_judged_together():
    """One in three fails for certain; a doubtful one that would fail alone does not fail among thirty."""
    names = [f"m{i}" for i in range(30)]
    machines = {n: Machine(seed=i, scatter=0.004, candidate=1.2 if i == 7 else 1.0) for i, n in enumerate(names)}
    subjects = [subject(n) for n in names]
    recorders = {s.name: Recorder(s, machines[s.name], Plan()) for s in subjects}
    checks = {c.id: c for c in judge.judge(subjects, Settings(), lambda s, n: recorders[s.name](n))}
    assert checks["m7/latency"].verdict == FAIL
    assert checks["m7/latency"].pairs > 10, "ten pairs cannot reach a thirtieth of the level"
    assert {checks[f"{n}/latency"].verdict for n in names if n != "m7"} == {PASS}
    assert judged(Machine(scatter=0.004, candidate=1.2))["m/latency"].pairs == 10


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [1e-3, math.inf, math.nan])
def test_a_wrong_model_fails_before_it_is_timed(error):
    machine = Machine()
    one = subject()
    one.facts = replace(one.facts, parity={"fine": 1e-7, "y": error})
    found = judged(machine, [one], Settings(budgets={"engine_size": 1.0}))
    assert list(found) == ["m/parity"] and found["m/parity"].verdict == FAIL
    assert found["m/parity"].reason_code == "other_function" and "output y" in found["m/parity"].reason
    assert not machine.opened


def test_the_same_model_is_timed():
    machine = Machine()
    assert judged(machine)["m/parity"].verdict == PASS
    assert machine.opened


def test_a_model_without_outputs_to_compare_does_not_pass():
    one = subject()
    one.facts = replace(one.facts, parity={})
    assert judged(Machine(), [one])["m/parity"].verdict == FAIL


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "limit", "value", "verdict"),
    [
        ("engine_size", 100.0, 100.0, PASS),
        ("engine_size", 100.0, 101.0, FAIL),
        ("build_time", 60.0, 61.0, FAIL),
        ("accuracy", 0.7, 0.71, PASS),
        ("accuracy", 0.7, 0.69, FAIL),
        ("peak_memory", 1e6, 2e6, FAIL),
        ("parity", 1e-4, 2e-4, FAIL),
    ],
)
def test_deterministic_budgets_need_no_statistics(key, limit, value, verdict):
    machine = Machine()
    settings = Settings(budgets={key: limit}, places={f"gate.budgets.{key}": "edgecompile.toml:7"})
    found = judged(machine, [subject(arms=(CANDIDATE,), measured={key: value})], settings)
    found = found["m/parity_budget" if key == "parity" else f"m/{key}"]
    assert (found.verdict, found.budget, found.candidate) == (verdict, limit, value)
    assert found.place == "edgecompile.toml:7"
    assert not machine.opened


def test_a_budget_that_cannot_be_checked_is_an_error_and_not_a_pass():
    with pytest.raises(InputError, match="accuracy"):
        judged(Machine(), [subject()], Settings(budgets={"accuracy": 0.5}))


@pytest.mark.parametrize(
    ("limit", "verdict"), [(0.9e-3, FAIL), (1.1e-3, PASS), (1.0133e-3, INCONCLUSIVE)], ids=["over", "under", "at"]
)
def test_latency_budgets_hold_the_whole_interval_against_the_limit(limit, verdict):
    settings = Settings(budgets={"latency_p50": limit, "latency_p99": 1.2e-3})
    found = judged(Machine(), [subject(arms=(CANDIDATE,))], settings)
    assert found["m/latency_p50"].verdict == verdict
    assert found["m/latency_p99"].verdict == PASS
    assert found["m/latency_p50"].pairs == 10


class SlowMachine(Machine):
    """Ten calls in a session, which takes 2 ms."""

    def __call__(self, arms, seed):
        time.sleep(2e-3)
        samples, void = super().__call__(arms, seed)
        return {n: replace(s, seconds=s.seconds[::6], rounds=s.rounds[::6]) for n, s in samples.items()}, void


def test_no_99th_percentile_from_few_calls():
    settings = Settings(Plan(time_limit=0.03), {"latency_p99": 1e-9})
    found = judged(SlowMachine(), [subject(arms=(CANDIDATE,))], settings)["m/latency_p99"]
    assert (found.verdict, found.reason_code) == (INCONCLUSIVE, "too_few_calls")


def test_a_99th_percentile_gets_the_calls_that_it_needs():
    settings = Settings(budgets={"latency_p99": 1e-9})
    found = judged(SlowMachine(), [subject(arms=(CANDIDATE,))], settings)["m/latency_p99"]
    assert (found.verdict, found.pairs) == (FAIL, 46)


def test_budgets_without_a_single_session_are_inconclusive():
    settings = Settings(Plan(time_limit=0.01), {"latency_p50": 1.0})
    found = judged(Machine(void="hot"), [subject(arms=(CANDIDATE,))], settings)["m/latency_p50"]
    assert (found.verdict, found.candidate) == (INCONCLUSIVE, None)


@pytest.mark.parametrize(("found", "verdict"), [(12, FAIL), (3, PASS), (0, PASS)])
def test_layers_that_the_dla_leaves_to_the_gpu(found, verdict):
    settings = Settings(budgets={"dla_fallback": 3.0}, places={"gate.budgets.dla_fallback": "e.toml:9"})
    check = judged(Machine(), [subject(measured={"dla_fallback": float(found)})], settings)["m/dla_fallback"]
    assert (check.verdict, check.candidate, check.unit, check.place) == (verdict, found, "layers", "e.toml:9")
    assert check.reason == f"layers that the DLA leaves to the GPU {found}, 3 is allowed"


def test_an_engine_that_is_not_for_the_dla_cannot_be_held_against_its_limit():
    with pytest.raises(InputError, match="dla_fallback cannot be checked") as caught:
        judged(Machine(), [subject()], Settings(budgets={"dla_fallback": 0.0}))
    assert "--option dla=0" in caught.value.fix
