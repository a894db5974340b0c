"""``bench``: what a result says of samples with known properties, and what a real engine's result holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edgecompile
from edgecompile import bench, board_runner, measure, remote
from edgecompile.bench import BenchResult, Timing
from edgecompile.bundle import MANIFEST, Bundle
from edgecompile.errors import EnvironmentMissing, InputError
from edgecompile.measure import P99_SAMPLES, Samples
from edgecompile.roofline import Level, Roofline
from edgecompile.target import Engine, EngineManifest

pytest.importorskip("onnxruntime")


def chain(path: Path, width: int, layers: int = 2) -> Path:
    """An ONNX file: ``layers`` products with random matrices, each followed by a Relu."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        values = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], f"product{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"x{i + 1}"], f"relu{i}"))
    ports = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [4, width]) for i in (0, layers)]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def build(folder: Path, width: int, layers: int = 2) -> Bundle:
    source = chain(folder / "net.onnx", width, layers)
    return edgecompile.build(str(source), output=folder / "bundle", bench=False, options={"threads": "1"})


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Bundle:
    return build(tmp_path_factory.mktemp("small"), 256)


@pytest.fixture
def quick(monkeypatch):
    """One child process for memory and cold start instead of three."""
    monkeypatch.setattr(bench, "_PROCESSES", 1)


@pytest.fixture(scope="module")
def measured(small: Bundle) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_PROCESSES", 1)
        return bench.run(small, small.probe()[0], seconds=1.5, precision=0.02)


def samples(sessions: list[np.ndarray], clock: str = "wall") -> Samples:
    runs = [Samples("a", clock, np.asarray(s, float), 1, np.zeros(len(s), int), 1e-7, (0.1, 0.2)) for s in sessions]
    return measure.joined(runs)


# -- summaries of known samples ----------------------------------------------------------------------------------------


def test_percentiles_are_those_of_the_calls():
    calls = np.random.default_rng(0).lognormal(-7, 0.1, 6000)
    timing = Timing.of(samples(np.split(calls, 6)))
    assert [p.q for p in timing.percentiles] == [10, 25, 50, 90, 99]
    for p in timing.percentiles:
        assert p.value == pytest.approx(np.percentile(calls, p.q))
        assert p.low <= (p.value or 0) <= p.high
    assert (timing.calls, timing.mean, timing.minimum) == (6000, pytest.approx(calls.mean()), calls.min())
    assert len(timing.samples) == bench.MOST_SAMPLES and len(timing.sessions) == 6


def test_intervals_hold_the_true_percentiles():
    rng, truth = np.random.default_rng(1), {10: 0.1, 25: 0.25, 50: 0.5, 90: 0.9, 99: 0.99}
    held = dict.fromkeys(truth, 0)
    for _ in range(60):
        for p in Timing.of(samples(list(rng.random((8, 120))))).percentiles:
            held[p.q] += p.low <= truth[p.q] <= p.high
    assert all(count >= 52 for count in held.values()), held  # of 60; 57 are expected, or more


def test_no_p99_from_too_few_calls():
    few = Timing.of(samples([np.linspace(1, 2, P99_SAMPLES - 1)])).percentile(99)
    assert few.value is None
    assert Timing.of(samples([np.linspace(1, 2, P99_SAMPLES)])).percentile(99).value == pytest.approx(1.99)
    assert Timing.of(samples([np.linspace(1, 2, 100)])).percentile(99).high == math.inf


def test_sessions_that_differ_widen_the_interval_of_the_median():
    calls = np.random.default_rng(2).normal(1e-3, 1e-6, (8, 500))
    alike = Timing.of(samples(list(calls)))
    offsets = np.array([-3, -2, -1, 0, 0, 1, 2, 3]) * 1e-5
    apart = Timing.of(samples(list(calls + offsets[:, None])))
    assert alike.precision < 2e-4 and alike.spread < 1e-3
    assert apart.precision > 0.015 and apart.spread == pytest.approx(0.06, abs=0.005)
    for q in (10, 90):
        assert apart.percentile(q).high - apart.percentile(q).low > 0.03e-3
    one = Timing.of(samples([(calls + offsets[:, None]).ravel()]))  # the same calls as if from one session
    assert one.precision < apart.precision


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_every_so_many_th_call_is_timed_by_both_clocks():
    made = []
    timed = bench._by_clock(lambda: made.append(time.sleep(0.001)), time.thread_time_ns, 4)
    start = time.perf_counter_ns()
    taken, walls = timed(0.1)
    spent = time.perf_counter_ns() - start
    assert len(made) == 4 * len(walls) == 4 * len(taken) > 20
    assert spent >= 0.1e9 and walls.sum() < 0.6 * spent
    assert walls.min() > 1e6 > 5 * np.median(taken)  # sleeping takes wall time and no CPU time
    _, every = bench._by_clock(lambda: time.sleep(0.001), time.thread_time_ns)(0.1)
    assert 0.8e8 < every.sum() < 1.5e8  # nothing but calls


def test_the_least_number_of_calls_is_timed_in_no_time():
    made = []
    taken, walls = bench._by_clock(lambda: made.append(1), time.perf_counter_ns, 3)(0.0, 5)
    assert (len(taken), len(walls), len(made)) == (5, 5, 15)
    assert len(bench._by_timer(lambda: 0.25)(0.0)[0]) == 2


@pytest.mark.parametrize(("call", "every"), [(1e-2, 1), (2e-3, 1), (1.5e-3, 2), (2e-4, 10), (2e-5, 100)])
def test_only_short_calls_are_thinned(call: float, every: int):
    assert bench._every(call) == every


class Alarm(Engine):
    """An engine with a clock of its own, which says that a call takes 3 ms."""

    manifest = EngineManifest("other", (), {}, "a device")
    threads = 0

    def __init__(self, clock: str):
        self.clock = clock

    def run(self, feeds):
        return {}

    def call(self, feeds):
        return lambda: time.sleep(0.001)

    def layers(self, feeds, repeats=10):
        return []


class Timed(Alarm):
    def timer(self, feeds):
        def once() -> float:
            time.sleep(0.001)
            return 0.003

        return once


def test_a_clock_that_only_the_engine_can_read():
    result = bench.run(Timed("cuda_event"), {}, seconds=0.05)
    own, wall = result.timings
    assert (own.clock, own.p50) == ("cuda_event", pytest.approx(0.003))
    assert wall.clock == "wall" and 0.001 <= wall.p50 < 0.003
    assert own.calls == wall.calls
    with pytest.raises(EnvironmentMissing, match="cuda_event"):
        bench.run(Alarm("cuda_event"), {}, seconds=0.05)


def test_an_open_engine_gives_one_session_and_says_so():
    result = bench.run(Alarm("wall"), {}, seconds=0.05)
    assert len(result.timings) == 1 and len(result.timing.sessions) == 1
    assert (result.memory, result.cold_start, result.engine_bytes) == (None, None, None)
    assert any("one session" in note for note in result.notes)


@pytest.mark.parametrize("wrong", [{"sessions": 0}, {"seconds": 0}])
def test_nothing_to_do_is_an_error(wrong):
    with pytest.raises(ValueError, match="needed"):
        bench.run(Alarm("wall"), {}, **wrong)


# -- a real engine -----------------------------------------------------------------------------------------------------


def test_a_result_holds_together(measured: BenchResult, small: Bundle):
    own, wall = measured.timings
    assert (own.clock, wall.clock) == ("thread_cpu", "wall")
    assert len(own.sessions) == len(wall.sessions) >= bench.SESSIONS
    assert own.calls == wall.calls
    for timing in measured.timings:
        values = [p.value for p in timing.percentiles if p.value is not None]
        assert values == sorted(values) and all(p.low <= p.high for p in timing.percentiles)
        assert 0 < timing.minimum <= timing.p50
        assert (timing.percentile(99).value is None) == (timing.calls < P99_SAMPLES)
    assert measured.throughput == pytest.approx(1 / wall.mean)
    assert measured.engine_bytes == (small.path / "model.ort.onnx").stat().st_size
    assert measured.threads == 1 and len(measured.load) == 2
    assert measured.memory and measured.memory.peak > 1 << 20 and measured.memory.baseline > 1 << 20
    start = measured.cold_start
    assert start and min(start.imports, start.opening, start.first_call) > 0
    assert start.total == pytest.approx(start.imports + start.opening + start.first_call)
    assert start.total > own.p50


def test_the_time_agrees_with_a_bare_loop(measured: BenchResult, small: Bundle):
    engine = small.engine()
    call = engine.call(small.probe()[0])
    best = math.inf
    for _ in range(20):
        start = time.thread_time()
        for _ in range(50):
            call()
        best = min(best, (time.thread_time() - start) / 50)
    engine.close()
    assert measured.timing.percentile(10).value == pytest.approx(best, rel=0.4)


def test_raw_samples_are_kept_and_the_bundle_stays_whole(small: Bundle, quick):
    before = (small.path / MANIFEST).read_bytes()
    result = bench.run(small, small.probe()[0], seconds=0.3, precision=1.0)
    assert (small.path / MANIFEST).read_bytes() == before
    Bundle.open(small.path)
    found, facts = measure.load(small.path / bench.SAMPLES)
    assert list(found) == ["thread_cpu", "wall"] and facts["name"]
    assert Timing.of(found["thread_cpu"]) == result.timing
    assert not result.notes


def test_samples_that_cannot_be_kept_are_no_failure(tmp_path, quick):
    made = build(tmp_path, 64)
    (made.path / bench.SAMPLES).mkdir()
    result = bench.run(made, made.probe()[0], seconds=0.2, precision=1.0)
    assert any("not kept" in note for note in result.notes)


def test_a_file_of_the_bundle_is_not_overwritten(small: Bundle):
    listed = {**small.manifest, "files": {**small.manifest["files"], bench.SAMPLES: {}}}
    with pytest.raises(InputError, match="part of the bundle"):
        bench.keep(Bundle(small.path, listed), {})


def test_it_ends_when_the_median_is_known_or_the_time_is_up(small: Bundle, quick, monkeypatch):
    monkeypatch.setattr(bench, "_SLICE", 0.05)
    feeds, told = small.probe()[0], []
    easy = bench.run(small, feeds, seconds=30, precision=10.0, sessions=7, progress=told.append)
    assert easy.settled and easy.seconds < 15 and len(easy.timing.sessions) == 7
    assert told == sorted(told) and len(told) == 7 and told[-1] <= 1
    hard = bench.run(small, feeds, seconds=0.5, precision=1e-9, sessions=2)
    assert not hard.settled and 0.5 <= hard.seconds < 6 and hard.wanted == 1e-9


def test_memory_grows_with_the_weights(tmp_path, measured: BenchResult, quick):
    made = build(tmp_path, 2048, layers=4)
    weights = 4 * 2048 * 2048 * 4
    memory, start = bench.footprint(lambda: board_runner.footprint(made.path))
    assert memory and measured.memory
    assert 0.9 * weights < memory.peak - measured.memory.peak < 3 * weights
    assert measured.cold_start and start.opening > measured.cold_start.opening


def test_a_process_that_fails_leaves_a_note(tmp_path, quick):
    made = build(tmp_path, 64)
    feeds = made.probe()[0]
    (made.path / "probe.npz").write_bytes(b"spoilt")  # a fresh process opens the bundle, and finds it damaged
    result = bench.run(made, feeds, seconds=0.1, precision=1.0)
    assert result.memory is None and result.cold_start is None
    assert any("memory and cold start" in note and "damaged" in note for note in result.notes)


def test_a_board_is_measured_by_its_own_sessions(small: Bundle, quick):
    """The local place stands for a board once it calls itself one: its sessions and processes are used, not ours."""

    class Elsewhere(remote.LocalBoard):
        device = "ssh://board"
        pairs = 0

        def pair(self, arms, **plan):
            self.pairs += 1
            return super().pair(arms, **plan)

    with Elsewhere() as board:
        result = bench.run(small, {}, board=board, seconds=0.3, precision=1.0)
    assert board.pairs == bench.SESSIONS == len(result.timing.sessions)
    assert [t.clock for t in result.timings] == ["thread_cpu", "wall"]
    assert result.memory and result.cold_start


def test_layers_come_with_modules_and_work(small: Bundle, monkeypatch):
    peaks = Roofline(1, 1e11, "", None, "", (Level("memory", None, 2e10),))
    monkeypatch.setattr(bench.roofline, "measured", lambda threads: {1: peaks}[threads])
    table = bench.layers(small, small.probe()[0], repeats=3)
    assert sum(c.macs for c in table.layers) == 2 * 4 * 256 * 256
    engine = small.engine()
    same = bench.layers(engine, small.probe()[0], repeats=3, graph=small.graph())
    engine.run(small.probe()[0])  # still open
    engine.close()
    assert {c.name for c in same.layers} == {c.name for c in table.layers}


# -- the document ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(measured: BenchResult, small: Bundle) -> BenchResult:
    peaks = Roofline(1, 1e11, "a", 4e11, "b", (Level("L2", 1 << 20, 1e11), Level("memory", None, 2e10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.roofline, "measured", lambda threads: peaks)
        return bench.with_layers(measured, bench.layers(small, small.probe()[0], repeats=3))


def valid(document: object) -> None:
    jsonschema.Draft202012Validator(bench.schema()).validate(document)


def test_the_document_follows_the_schema_and_comes_back(full: BenchResult, measured: BenchResult):
    jsonschema.Draft202012Validator.check_schema(bench.schema())
    for result in (full, measured, bench.run(Alarm("wall"), {}, seconds=0.02)):
        document = json.loads(json.dumps(result.to_json(), allow_nan=False))
        valid(document)
        assert BenchResult.from_json(document) == result
    assert full.layers and not measured.layers


def test_what_follows_from_the_rest_is_written(full: BenchResult):
    document = full.to_json()
    assert full.layers
    assert document["timings"][0]["precision"] == full.timing.precision
    assert document["layers"]["layers"][0]["gap"] == full.layers.layers[0].gap
    assert document["throughput"] == full.throughput and document["settled"] == full.settled


@pytest.mark.parametrize("how", ["unknown key", "missing key", "wrong type", "wrong clock", "other schema", "deep"])
def test_a_broken_document_is_refused(full: BenchResult, how: str):
    document: dict[str, Any] = copy.deepcopy(full.to_json())
    valid(document)
    match how:
        case "unknown key":
            document["extra"] = 1
        case "missing key":
            del document["timings"][0]["percentiles"][0]["low"]
        case "wrong type":
            document["engine_bytes"] = "12"
        case "wrong clock":
            document["timings"][0]["clock"] = 1
        case "other schema":
            document["schema"] = "edgecompile.bench/2"
        case "deep":
            document["layers"]["roofline"]["levels"][0]["extra"] = 1
    with pytest.raises(jsonschema.ValidationError):
        valid(document)
    with pytest.raises(InputError):
        BenchResult.from_json(document)


def test_samples_from_elsewhere_make_a_result(measured: BenchResult):
    taken = samples([np.full(20, 2e-3)] * 6, "thread_cpu")
    manifest = EngineManifest("ort", (), {"onnxruntime": "1"}, "a board")
    result = BenchResult.of("net", manifest, {"thread_cpu": taken}, seconds=1.0, wanted=0.1, machine={"cpu": "far"})
    assert (result.device, result.machine, result.load) == ("a board", {"cpu": "far"}, (0.1, 0.2))
    assert result.settled and result.throughput == pytest.approx(500)
    assert dataclasses.replace(result, wanted=-1.0).settled is False
