"""Interleaved timing: known ratios, order, warm-up, what a percentile needs, and the facts about the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgecompile import measure
from edgecompile.errors import InputError
from edgecompile.measure import P99_SAMPLES, Samples, interleave, ratio

MATRIX = np.random.default_rng(0).standard_normal((48, 48)).astype(np.float32)


def work(repeats: int):
    """A function that does ``repeats`` equal pieces of real work."""

    def call() -> None:
        for _ in range(repeats):
            MATRIX @ MATRIX

    return call


def synthetic(label: str, seconds, rounds=None) -> Samples:
    seconds = np.asarray(seconds, np.float64)
    return Samples(label, "wall", seconds, 1, np.arange(len(seconds)) if rounds is None else np.asarray(rounds))


# -- ratios ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms() -> dict[str, Samples]:
    return interleave({"base": work(100), "same": work(100), "more": work(125)}, "thread_cpu", seconds=1.0)


def test_equal_arms_are_equal(arms):
    found = ratio(arms["same"], arms["base"])
    assert found.value == pytest.approx(1.0, abs=0.03)
    assert found.low <= found.value <= found.high
    assert found.rounds >= 20


def test_a_quarter_more_work_takes_a_quarter_more_time(arms):
    found = ratio(arms["more"], arms["base"])
    assert found.value == pytest.approx(1.25, abs=0.05)
    assert 1.15 < found.low <= found.high < 1.35
    assert ratio(arms["base"], arms["more"]).value == pytest.approx(1 / found.value, rel=0.02)


def test_drift_that_hits_both_arms_cancels():
    rounds = np.repeat(np.arange(30), 5)
    drift = np.linspace(1, 3, 30)[rounds] * np.random.default_rng(0).uniform(0.99, 1.01, 150)
    order = np.random.default_rng(1).permutation(5)
    shuffled = drift.reshape(30, 5)[:, order].ravel()
    found = ratio(synthetic("new", shuffled * 1.1, rounds), synthetic("old", drift, rounds))
    assert found.value == pytest.approx(1.1)
    assert (found.low, found.high) == (pytest.approx(1.1), pytest.approx(1.1))


def test_one_disturbed_round_does_not_move_the_ratio():
    base = np.ones(21)
    disturbed = base * 1.2
    disturbed[7] = 50.0
    assert ratio(synthetic("new", disturbed), synthetic("old", base)).value == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("rounds", "rank", "coverage"),
    [(6, 1, 0.9688), (10, 2, 0.9785), (20, 6, 0.9586), (25, 8, 0.9567), (50, 18, 0.9672)],
)
def test_interval_is_that_of_the_sign_test(rounds, rank, coverage):
    values = np.random.default_rng(rounds).permutation(np.arange(1.0, rounds + 1))
    found = ratio(synthetic("new", values), synthetic("old", np.ones(rounds)))
    assert (found.low, found.high) == (rank, rounds + 1 - rank)
    assert found.confidence == pytest.approx(coverage, abs=1e-4)  # Conover, table A3


def test_too_few_rounds_claim_less_confidence():
    found = ratio(synthetic("new", [1.0, 2.0, 3.0]), synthetic("old", [1.0, 1.0, 1.0]))
    assert (found.low, found.high, found.confidence) == (1.0, 3.0, pytest.approx(0.75))
    assert ratio(synthetic("new", [2.0]), synthetic("old", [1.0])).confidence == 0


def test_interval_covers_the_true_median():
    rng = np.random.default_rng(0)
    ones = synthetic("old", np.ones(23))
    hits = [
        (r := ratio(synthetic("new", np.exp(rng.standard_normal(23))), ones)).low <= 1 <= r.high for _ in range(1000)
    ]
    assert 0.94 <= np.mean(hits) <= 0.985  # 0.9653 by the binomial


def test_many_rounds():
    found = ratio(synthetic("new", np.linspace(1, 2, 5001)), synthetic("old", np.ones(5001)))
    assert found.value == pytest.approx(1.5)
    assert 1.48 < found.low < 1.5 < found.high < 1.52


def test_arms_of_different_runs_do_not_compare():
    with pytest.raises(ValueError, match="one run"):
        ratio(synthetic("new", [1.0], [4]), synthetic("old", [1.0], [5]))


# -- percentiles -------------------------------------------------------------------------------------------------------


def test_p99_needs_459_calls():
    assert 1 - 0.99**P99_SAMPLES >= 0.99 > 1 - 0.99 ** (P99_SAMPLES - 1)
    enough = synthetic("a", np.linspace(0, 1, P99_SAMPLES))
    assert enough.p99 == pytest.approx(0.99)
    few = synthetic("a", np.linspace(0, 1, P99_SAMPLES - 1))
    assert few.p99 is None
    assert few.as_dict()["p99_ms"] is None
    assert few.p90 == pytest.approx(0.9)


def test_as_dict_speaks_milliseconds():
    found = synthetic("a", [0.001, 0.002, 0.004], [0, 0, 1]).as_dict()
    assert (found["p50_ms"], found["min_ms"], found["calls"], found["rounds"]) == (2.0, 1.0, 3, 2)
    assert json.loads(json.dumps(found)) == found


# -- the run -----------------------------------------------------------------------------------------------------------


def order(seed: int, rounds: int = 40) -> list[str]:
    """The order in which three arms are called, one call per block, after the warm-up."""
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    interleave(calls, "wall", seconds=0, min_calls=rounds, block_ms=0, seed=seed)
    return made[-3 * rounds :]


def test_order_is_random_and_follows_the_seed():
    first = order(1)
    assert first == order(1)
    assert first != order(2)
    rounds = ["".join(first[i : i + 3]) for i in range(0, len(first), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) == 6  # every order occurs


def test_rounds_are_blocks():
    found = interleave({"a": work(5), "b": work(5)}, "wall", seconds=0.1, block_ms=2)
    for samples in found.values():
        assert samples.seconds.shape == samples.rounds.shape
        assert (np.diff(samples.rounds) >= 0).all()
        assert set(samples.rounds) == set(range(samples.rounds[-1] + 1))
        assert len(samples.seconds) > len(set(samples.rounds)), "a block holds many calls"
        assert samples.seconds.min() > 0


def test_cold_calls_are_not_counted():
    made = 0

    def call() -> None:
        nonlocal made
        made += 1
        time.sleep(max(0.08 / 2**made, 0.002))

    samples = interleave({"a": call}, "wall", seconds=0.2)["a"]
    assert samples.percentile(90) < 0.005
    assert made >= len(samples.seconds) + 6


def test_warm_up_gives_up_on_an_arm_that_never_settles(monkeypatch):
    monkeypatch.setattr(measure, "_WARM_SECONDS", 0.05)
    state = iter(range(10**9))
    start = time.perf_counter()
    interleave({"a": lambda: time.sleep(0.001 * (1 + next(state) % 7))}, "wall", seconds=0, min_calls=1, block_ms=0)
    assert time.perf_counter() - start < 2


def test_slow_arms_get_their_minimum_and_nothing_more():
    samples = interleave({"a": lambda: time.sleep(0.02)}, "wall", seconds=0, min_calls=5)["a"]
    assert len(samples.seconds) == 5


def test_progress_reaches_one():
    seen: list[float] = []
    interleave({"a": work(5)}, "wall", seconds=0.1, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 3


def test_thread_cpu_does_not_count_waiting():
    calls = {"a": lambda: time.sleep(0.003)}
    assert interleave(calls, "thread_cpu", seconds=0, min_calls=10)["a"].p50 < 0.001
    assert interleave(calls, "wall", seconds=0, min_calls=10)["a"].p50 >= 0.003


@pytest.mark.parametrize("clock", ["thread_cpu", "wall"])
def test_timing_costs_less_than_one_percent_of_200_us(clock):
    runs = [interleave({"empty": lambda: None}, clock, seconds=0.1)["empty"] for _ in range(5)]
    samples = min(runs, key=lambda s: s.overhead + s.p50)  # the others tell of what else the machine was doing
    assert 0 < samples.overhead <= 0.01 * 200e-6
    assert samples.p50 == pytest.approx(samples.overhead, rel=0.5)


def test_garbage_collection_is_off_while_timing_and_on_again_after():
    seen: set[bool] = set()
    interleave({"a": lambda: seen.add(gc.isenabled())}, "wall", seconds=0)
    assert seen == {False}
    assert gc.isenabled()

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave({"a": broken}, "wall")
    assert gc.isenabled()


def test_bad_calls():
    with pytest.raises(ValueError, match="nothing to measure"):
        interleave({}, "wall")
    with pytest.raises(ValueError, match="no clock is called 'cuda_event'"):
        interleave({"a": work(1)}, "cuda_event")


# -- the machine -------------------------------------------------------------------------------------------------------


def test_machine_is_plain_data():
    facts = measure.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["arch"] == os.uname().machine
    assert 1 <= facts["cores"] <= len(os.sched_getaffinity(0)) <= facts["cpus"]
    assert facts["memory_bytes"] > 1 << 28
    assert tuple(facts["features"]) == measure.cpu_features()


def test_features_are_those_of_the_kernel():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert set(measure.cpu_features()) <= flags
    if os.uname().machine == "x86_64":
        assert ("avx2" in measure.cpu_features()) == ("avx2" in flags)


def test_threads_get_fast_cores_first_and_a_core_each():
    """Two slow cores, then two fast ones, each of which appears as two CPUs."""
    files = {}
    for cpu, (siblings, hertz) in enumerate([("0", 1800), ("1", 1800), *[("2,4", 2400), ("3,5", 2400)] * 2]):
        files[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
        files[f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq"] = f"{hertz}000"
    assert measure.for_threads(range(6), lambda path: files[path]) == [2, 3, 0, 1, 4, 5]
    assert measure.for_threads([3, 0, 1], lambda _: "") == [0, 1, 3]  # a machine that tells nothing
    assert sorted(measure.for_threads(measure.affinity())) == measure.affinity()


def test_affinity_limits_the_cores():
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from edgecompile import measure; print(measure.available_cores(), measure.machine()['affinity'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(min(os.sched_getaffinity(0)))]


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 4], "1,3-4"), ([10, 11], "10-11")]
)
def test_ranges(numbers, text):
    assert measure._ranges(numbers) == text


def test_sessions_are_the_unit_of_evidence():
    """Two sessions of one model differ by a few percent: many calls in one pair prove nothing about the model."""
    speeds = iter([1.0, 1.1] * 6)  # every other session of the "same" arm is 10 % slower
    opened = []

    @contextlib.contextmanager
    def open_arms():
        work = [int(2000 * next(speeds)) for _ in range(2)]
        work = work if len(opened) % 2 else work[::-1]
        opened.append(work)
        yield {"a": lambda: sum(range(work[0])), "b": lambda: sum(range(work[1]))}

    samples = measure.interleave_sessions(open_arms, "thread_cpu", sessions=6, seconds=1.5)
    both = measure.ratio(samples["a"], samples["b"])
    assert both.rounds == 6 and both.confidence >= 0.95
    assert both.low < 1 < both.high, "the interval spans what the sessions showed"
    first = {
        name: dataclasses.replace(s, seconds=s.seconds[m], rounds=s.rounds[m], sessions=None)
        for name, s in samples.items()
        for m in [s.sessions == 0]
    }
    alone = measure.ratio(first["a"], first["b"])
    assert alone.low > 1, "one pair alone would have claimed a difference"


# -- one pair of sessions ----------------------------------------------------------------------------------------------


def test_log_ratio_is_the_median_over_rounds_of_the_blocks_lower_quartiles():
    base = synthetic("base", [1, 2, 3, 4, 5, 10, 20, 30, 40, 50], [0] * 5 + [1] * 5)
    slower = synthetic("slower", [4, 2, 6, 8, 10, 20, 40, 60, 80, 100], [0] * 5 + [1] * 5)
    assert measure.log_ratio(slower, base) == pytest.approx(np.log(2))
    assert measure.log_ratio(base, slower) == -measure.log_ratio(slower, base)


def test_log_ratio_does_not_see_slow_calls_that_are_few():
    base = synthetic("base", np.ones(100), np.repeat(range(10), 10))
    disturbed = synthetic("disturbed", np.tile([1, 1, 1, 1, 1, 1, 9, 9, 9, 9], 10), np.repeat(range(10), 10))
    assert measure.log_ratio(disturbed, base) == 0
    assert measure.log_ratio(synthetic("all", np.full(100, 9.0), disturbed.rounds), base) == pytest.approx(np.log(9))


def test_log_ratio_refuses_arms_of_different_runs():
    with pytest.raises(ValueError, match="not measured in one run"):
        measure.log_ratio(synthetic("a", [1.0], [0]), synthetic("b", [1.0], [1]))


# -- storing samples ---------------------------------------------------------------------------------------------------


def recorded() -> dict[str, Samples]:
    rng = np.random.default_rng(3)
    first = [Samples("x", "thread_cpu", rng.random(5), 1, np.array([0, 0, 1, 1, 2]), 1e-7, (0.1, 0.3)) for _ in "ab"]
    return {"1:engine": measure.joined(first), "odd/ name\n": synthetic("plain", rng.random(3))}


def test_samples_come_back_bit_for_bit(tmp_path):
    samples = recorded()
    measure.save(tmp_path / "samples.npz", samples, plan={"alpha": 0.1 + 0.2}, names=["a"])
    found, facts = measure.load(tmp_path / "samples.npz")
    assert facts == {"plan": {"alpha": 0.1 + 0.2}, "names": ["a"]}
    assert list(found) == list(samples)
    for name, one in samples.items():
        for field in dataclasses.fields(Samples):
            np.testing.assert_array_equal(getattr(found[name], field.name), getattr(one, field.name))
            assert type(getattr(found[name], field.name)) is type(getattr(one, field.name))


def test_sessions_are_taken_apart_as_they_were_joined():
    joined = recorded()["1:engine"]
    parts = measure.by_session(joined)
    assert [list(p.rounds) for p in parts] == [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    np.testing.assert_array_equal(np.concatenate([p.seconds for p in parts]), joined.seconds)
    assert all(p.sessions is None for p in parts)
    alone = synthetic("x", [1.0])
    assert measure.by_session(alone) == [alone]


def test_what_is_not_a_recording_is_refused(tmp_path):
    path = tmp_path / "samples.npz"
    for spoil in (
        lambda: path.write_bytes(b"nothing"),
        lambda: np.savez(path, other=np.ones(3)),
        lambda: np.savez(path, header=np.frombuffer(b'{"schema": "other"}', np.uint8)),
        lambda: np.savez(path, header=np.frombuffer(b"[]", np.uint8)),
        lambda: np.savez(path, header=np.array([{}], dtype=object)),
        path.unlink,
    ):
        spoil()
        with pytest.raises(InputError, match="cannot be read as recorded samples"):
            measure.load(path)
    measure.save(path, recorded())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError):
        measure.load(path)
