"""The roofline: bounds in closed form, peaks of this machine, the cache, and what each layer is charged with."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgecompile import oracle, registry, roofline, stats
from edgecompile.errors import EnvironmentMissing
from edgecompile.graph import Graph
from edgecompile.roofline import Level, Roofline, layer_table
from edgecompile.target import LayerTime

PEAKS = Roofline(
    1, 100e9, "a product", 400e9, "a smaller product",
    (Level("L2", 1 << 20, 200e9), Level("L3", 32 << 20, 100e9), Level("memory", None, 20e9)),
)  # fmt: skip


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_slower_of_arithmetic_and_transfer():
    assert PEAKS.bandwidth_bytes_per_s == 20e9
    assert PEAKS.bound(100e9, 1) == pytest.approx(1.0)
    assert PEAKS.bound(1, 20e9) == pytest.approx(1.0)
    ridge = PEAKS.macs_per_s / PEAKS.bandwidth_bytes_per_s  # MACs per byte at which both take equally long
    assert PEAKS.compute(ridge * 1e6) == pytest.approx(PEAKS.transfer(1e6))
    assert PEAKS.bound(2 * ridge * 1e6, 1e6) == pytest.approx(2 * PEAKS.transfer(1e6))
    assert PEAKS.bound(ridge * 1e6 / 2, 1e6) == pytest.approx(PEAKS.transfer(1e6))


def test_small_working_sets_move_at_the_speed_of_their_cache():
    assert PEAKS.bound(0, 1e6, working_set=1 << 20) == pytest.approx(1e6 / 200e9)
    assert PEAKS.bound(0, 1e6, working_set=(1 << 20) + 1) == pytest.approx(1e6 / 100e9)
    assert PEAKS.bound(0, 1e6, working_set=1 << 30) == PEAKS.bound(0, 1e6) == pytest.approx(1e6 / 20e9)


def test_eight_bit_arithmetic_has_its_own_peak_where_there_is_one():
    assert PEAKS.bound(100e9, 0, int8=True) == pytest.approx(0.25)
    without = Roofline(1, 100e9, "", None, "", PEAKS.levels)
    assert without.bound(100e9, 0, int8=True) == pytest.approx(1.0)


# -- this machine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Roofline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_SECONDS", 0.02)
        patch.setattr(roofline, "_PRODUCTS", (384,))
        patch.setattr(roofline, "_CONVOLUTIONS", ((64, 28, 3),))
        return roofline._measure(1)


def test_no_product_beats_the_peak_by_far(here: Roofline):
    a = np.random.default_rng(0).standard_normal((384, 384), np.float32)
    best = math.inf
    for _ in range(50):
        start = time.thread_time()
        a @ a
        best = min(best, time.thread_time() - start)
    assert 0.2 < 384**3 / best / here.macs_per_s < 1.3
    assert here.macs_from


def test_no_copy_beats_the_bandwidth_of_memory_by_far(here: Roofline):
    source = np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    best = math.inf
    for _ in range(5):
        start = time.thread_time()
        np.copyto(target, source)
        best = min(best, time.thread_time() - start)
    assert 0.1 < 2 * source.nbytes / best / here.bandwidth_bytes_per_s < 1.6


def test_nearer_levels_are_not_slower(here: Roofline):
    rates = [level.bytes_per_s for level in here.levels]
    assert rates == sorted(rates, reverse=True)
    assert here.levels[-1].capacity is None and all(level.capacity for level in here.levels[:-1])


def test_integers_are_measured_where_the_runtime_has_them(here: Roofline):
    pytest.importorskip("onnxruntime")
    assert here.int8_macs_per_s and here.int8_from.startswith("ONNX Runtime")


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path) -> list[tuple[str, ...]]:
    """Measurements that were made, each of which gives :data:`PEAKS`; the cache is an empty folder."""
    made: list[tuple[str, ...]] = []

    def measure(*arguments: str, **_) -> str:
        made.append(arguments)
        return json.dumps(roofline.documents.encode(PEAKS, {}))

    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "fresh_process", measure)
    return made


def kept(folder: Path) -> Path:
    (file,) = (folder / "cache" / "roofline").iterdir()
    return file


def test_it_is_measured_once(counted, tmp_path):
    assert roofline.measured(1) == roofline.measured(1) == PEAKS
    assert counted == [("edgecompile.roofline", "1")]
    roofline.measured(2)
    assert len(counted) == 2  # another number of threads is another machine
    roofline.measured(1, fresh=True)
    assert len(counted) == 3


@pytest.mark.parametrize("damage", ["a digit", "half of it", "not JSON", "another form"])
def test_a_damaged_file_is_measured_again(counted, tmp_path, damage):
    roofline.measured(1)
    file = kept(tmp_path)
    text = file.read_text()
    content = json.loads(text)
    damaged = {
        "a digit": text.replace("100000000000.0", "900000000000.0"),
        "half of it": text[: len(text) // 2],
        "not JSON": "\0",
        "another form": json.dumps({**content, "roofline": []}),
    }[damage]
    assert damaged != text
    file.write_text(damaged)
    assert roofline.measured(1) == PEAKS
    assert len(counted) == 2
    assert file.read_text() == text
    roofline.measured(1)
    assert len(counted) == 2


def test_another_machine_is_measured_for_itself(counted, monkeypatch):
    roofline.measured(1)
    facts = roofline.measure.machine()
    monkeypatch.setattr(roofline.measure, "machine", lambda: {**facts, "load": [9.0, 9.0, 9.0]})
    roofline.measured(1)
    assert len(counted) == 1  # load is no property of it
    monkeypatch.setattr(roofline.measure, "machine", lambda: {**facts, "cpu": "another"})
    roofline.measured(1)
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written_is_no_error(counted, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert roofline.measured(1) == roofline.measured(1) == PEAKS
    assert len(counted) == 2


def test_a_device_that_is_no_cpu_has_no_roofline_here(counted):
    with pytest.raises(EnvironmentMissing, match="does not run on the CPU"):
        roofline.measured(0)
    assert not counted


def test_a_process_that_fails_is_named_with_its_last_words():
    with pytest.raises(EnvironmentMissing, match="invalid literal for int"):
        roofline.fresh_process("edgecompile.roofline", "one")


@pytest.mark.slow
def test_a_process_of_its_own_measures_it(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path))
    found = roofline.measured(1)
    assert 1e8 < found.macs_per_s < 1e13 and 1e8 < found.bandwidth_bytes_per_s < 1e13
    assert roofline.measured(1) == found


# -- layers ------------------------------------------------------------------------------------------------------------


def value(name: str, *shape, dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def make(nodes, inputs, outputs, weights) -> Graph:
    made = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, made)
    return Graph.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def convolutions() -> Graph:
    """Conv 3 -> 8, Relu, Conv 8 -> 8, Add of the Relu's result; 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b"], ["a"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "act"),
        helper.make_node("Conv", ["r", "w2"], ["c"], "second", pads=[1] * 4),
        helper.make_node("Add", ["c", "r"], ["y"], "sum"),
    ]
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
        "w2": rng.standard_normal((8, 8, 3, 3)).astype(np.float32),
    }
    return make(nodes, [value("x", "n", 3, 16, 16)], [value("y", "n", 8, 16, 16)], weights)


IN, MID = 3 * 256 * 4, 8 * 256 * 4  # bytes of the input, and of each of the other tensors
FIRST_MACS, SECOND_MACS = 8 * 256 * 27, 8 * 256 * 72


def costs(layers, graph: Graph, feeds=None) -> dict[str, roofline.LayerCost]:
    return {cost.name: cost for cost in layer_table(layers, graph, PEAKS, feeds).layers}


def test_a_fused_layer_pays_for_what_crosses_its_border():
    fused = [
        LayerTime("one", "Conv", 10.0, ("first", "act"), ("stem",)),
        LayerTime("two", "Conv", 20.0, ("second", "sum"), ("body",)),
    ]
    found = costs(fused, convolutions())
    one, two = found["one"], found["two"]
    assert (one.macs, one.weight_bytes, one.activation_bytes) == (FIRST_MACS, 8 * 27 * 4 + 32, IN + MID)
    assert (two.macs, two.weight_bytes, two.activation_bytes) == (SECOND_MACS, 8 * 72 * 4, 2 * MID)  # r once, y
    assert one.intensity == pytest.approx(one.macs / one.bytes)
    assert one.compute == pytest.approx(FIRST_MACS / 100e9)
    assert one.transfer == pytest.approx(one.bytes / 200e9)
    assert one.bound == max(one.compute, one.transfer)
    assert one.gap == pytest.approx(10e-6 - one.bound)
    assert one.efficiency == pytest.approx(one.bound / 10e-6)
    assert two.limit == "compute"


def test_layers_that_are_not_fused_pay_for_the_tensors_between():
    names = ("first", "act", "second", "sum")
    found = costs([LayerTime(n, n, 1.0, (n,)) for n in names], convolutions())
    assert found["first"].activation_bytes == IN + MID
    assert found["act"].activation_bytes == 2 * MID
    assert found["sum"].activation_bytes == 3 * MID
    assert found["act"].macs == 0 and found["act"].limit == "memory"


def test_the_batch_of_the_feeds_counts():
    layers = [LayerTime("all", "Conv", 1.0, ("first", "act", "second", "sum"))]
    feeds = {"x": np.zeros((3, 3, 16, 16), np.float32)}
    one, three = costs(layers, convolutions())["all"], costs(layers, convolutions(), feeds)["all"]
    assert (three.macs, three.activation_bytes) == (3 * one.macs, 3 * one.activation_bytes)
    assert three.weight_bytes == one.weight_bytes


def test_work_that_several_layers_claim_counts_once():
    layers = [
        LayerTime("reorder", "ReorderInput", 90.0, ("first",)),
        LayerTime("kernel", "Conv", 5.0, ("first", "act")),
        LayerTime("rest", "Conv", 5.0, ("second", "sum")),
    ]
    found = costs(layers, convolutions())
    assert found["kernel"].macs == FIRST_MACS
    assert (found["reorder"].macs, found["reorder"].bytes, found["reorder"].limit) == (0, 0, "nothing")
    assert found["reorder"].gap == pytest.approx(90e-6) and found["reorder"].efficiency == 0
    nobody = costs([LayerTime("a", "X", 2.0, ("first",)), LayerTime("b", "Y", 3.0, ("first",))], convolutions())
    assert (nobody["a"].macs, nobody["b"].macs) == (0, FIRST_MACS)  # the longest, where no operator tells


def test_weights_stream_from_where_those_of_the_whole_model_fit():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "small"), helper.make_node("MatMul", ["a", "v"], ["y"], "large")
    ]  # fmt: skip
    weights = {"w": rng.standard_normal((64, 64)).astype(np.float32), "v": np.zeros((64, 1 << 15), np.float32)}
    graph = make(nodes, [value("x", 1, 64)], [value("y", 1, 1 << 15)], weights)
    found = costs([LayerTime(n, "MatMul", 9.0, (n,)) for n in ("small", "large")], graph)
    assert sum(c.weight_bytes for c in found.values()) > 1 << 20  # more than the second level holds
    assert found["small"].transfer == pytest.approx(64 * 64 * 4 / 100e9 + 2 * 64 * 4 / 200e9)


def test_views_move_nothing_and_tables_only_the_rows_looked_up():
    nodes = [
        helper.make_node("Gather", ["table", "i"], ["e"], "embed"),
        helper.make_node("Reshape", ["e", "shape"], ["y"], "view"),
    ]
    weights = {"table": np.zeros((1000, 16), np.float32), "shape": np.array([-1], np.int64)}
    graph = make(nodes, [value("i", 4, dtype=TensorProto.INT64)], [value("y", None)], weights)
    found = costs([LayerTime(n, n, 1.0, (n,)) for n in ("embed", "view")], graph)
    assert found["embed"].weight_bytes == 4 * 16 * 4
    assert found["embed"].activation_bytes == 4 * 8 + 4 * 16 * 4
    assert found["view"].bytes == 0


def test_integer_layers_are_held_to_the_integer_peak():
    shapes = [value("x", 8, 64, dtype=TensorProto.UINT8)], [value("y", 8, 32, dtype=TensorProto.INT32)]
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"], "product")
    found = costs([LayerTime("l", "MatMulInteger", 1.0, ("product",))], make([node], *shapes, {
        "w": np.zeros((64, 32), np.int8)
    }))["l"]  # fmt: skip
    assert found.activation_bytes == 8 * 64 + 8 * 32 * 4 and found.weight_bytes == 64 * 32
    assert found.compute == pytest.approx(found.macs / 400e9)


def test_unknown_shapes_are_counted_not_guessed():
    nodes = [
        helper.make_node("NonZero", ["x"], ["i"], "find"), helper.make_node("Identity", ["i"], ["y"], "out")
    ]  # fmt: skip
    graph = make(nodes, [value("x", 4)], [value("y", 1, "k", dtype=TensorProto.INT64)], {})
    table = layer_table([LayerTime("l", "NonZero", 1.0, ("find",))], graph, PEAKS)
    assert table.unknown == 1 and table.layers[0].activation_bytes == 16
    assert layer_table([LayerTime("l", "Conv", 1.0, ("first",))], convolutions(), PEAKS).unknown == 0


def test_modules_sum_their_layers_and_the_largest_gap_comes_first():
    layers = [
        LayerTime("one", "Conv", 10.0, ("first", "act"), ("stem.conv",)),
        LayerTime("two", "Conv", 30.0, ("second",), ("body.conv",)),
        LayerTime("three", "Add", 1e-4, ("sum",), ("body.add",)),  # faster than its roofline
        LayerTime("four", "Thing", 50.0),
    ]
    table = layer_table(layers, convolutions(), PEAKS)
    assert [c.gap for c in table.layers] == sorted((c.gap for c in table.layers), reverse=True)
    assert [m.gap for m in table.modules] == sorted((m.gap for m in table.modules), reverse=True)
    assert table.modules[0].path == "(no module)" and table.modules[0].gap == pytest.approx(50e-6)
    assert table.seconds == pytest.approx(sum(m.seconds for m in table.modules)) == pytest.approx(90.0001e-6)
    assert sum(m.macs for m in table.modules) == FIRST_MACS + SECOND_MACS
    assert table.layers[-1].name == "three" and table.layers[-1].gap < 0
    assert table.gap == pytest.approx(sum(c.gap for c in table.layers if c.gap > 0))
    assert table.gap == pytest.approx(sum(m.gap for m in table.modules))
    assert all(m.bound + m.gap == pytest.approx(m.seconds) for m in table.modules)


def test_a_real_engine_is_charged_with_the_whole_work_of_its_graph(tmp_path):
    pytest.importorskip("onnxruntime")
    graph = convolutions()
    feeds = oracle.random_feeds(graph.signature().inputs, 0)
    engine = registry.target("ort").build(graph, tmp_path, {"threads": "1"})
    table = layer_table(engine.layers(feeds, 3), graph, PEAKS, feeds)
    engine.close()
    assert sum(c.macs for c in table.layers) == stats.count(graph, feeds).macs
    assert sum(c.weight_bytes for c in table.layers) == stats.count(graph).bytes
    assert table.seconds > 0 and not table.unknown
