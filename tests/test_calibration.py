"""Calibration: closed forms, the naive computation over all data at once, and ONNX Runtime's own calibrator."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from edgecompile import calibration, oracle
from edgecompile.calibration import Histogram, Observer, Range, Statistics, collect, observe, scale_zero_point
from edgecompile.calibration_data import CalibrationData, open_data
from edgecompile.errors import InputError
from edgecompile.graph import Graph

RNG = np.random.default_rng(0)


def model(nodes, weights=(), shape=("n", 3, 16, 16), outputs=("y",), dtype=TensorProto.FLOAT) -> Graph:
    proto = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in dict(weights).items()],
    )  # fmt: skip
    return Graph.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def convnet(shape=("n", 3, 16, 16)) -> Graph:
    """Two convolutions with a residual between, a reshape and a product."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="first"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], name="second"),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="residual"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("MatMul", ["f", "w3"], ["y"], name="head"),
    ]
    normal = lambda *s: rng.standard_normal(s, np.float32)  # noqa: E731
    return model(
        nodes, {"w1": normal(8, 3, 3, 3), "b1": normal(8), "w2": normal(8, 8, 3, 3), "w3": normal(8, 5)}, shape
    )


TENSORS = ("x", "c1", "r1", "c2", "a", "p", "f", "y")


def images(count: int, seed: int = 0, shape=(3, 16, 16)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, *shape)) * rng.uniform(0.1, 3, (count, 1, 1, 1))).astype(np.float32)


def data(graph: Graph, batches) -> CalibrationData:
    return open_data(list(batches), graph.signature().inputs)


def exactly(one: Statistics) -> str:
    """Equal for equal statistics, to the last bit."""
    return json.dumps(calibration._encode(calibration._Key("t", None, True), one))


def stats(values: np.ndarray) -> Statistics:
    observer = Observer()
    observer.add(values)
    return observer.statistics()


# -- scale and zero point ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "dtype", "symmetric", "bits", "scale", "zero"),
    [
        (-2.54, 1.0, np.int8, True, None, 0.02, 0),
        (-1.0, 2.54, np.uint8, True, None, 0.02, 128),
        (-6.3, 1.0, np.int8, True, 7, 0.1, 0),
        (0.0, 2.55, np.uint8, False, None, 0.01, 0),
        (0.0, 2.55, np.int8, False, None, 0.01, -128),
        (0.0, 1.27, np.uint8, False, 7, 0.01, 0),
        (-1.0, 1.55, np.uint8, False, None, 0.01, 100),
        (1.0, 2.55, np.uint8, False, None, 0.01, 0),  # extended to zero
        (-2.55, -1.0, np.uint8, False, None, 0.01, 255),
        (0.0, 0.0, np.int8, True, None, 1.0, 0),
        (0.0, 0.0, np.uint8, False, None, 1.0, 0),
        (-1e-45, 1e-45, np.int8, True, None, 1.0, 0),  # its scale would not be a normal number
        (-327.67, 0.0, np.int16, True, None, 0.01, 0),
    ],
)
def test_scale_and_zero_point_are_the_closed_form(low, high, dtype, symmetric, bits, scale, zero):
    found = scale_zero_point(Range(low, high, "minmax"), dtype, symmetric, bits=bits)
    assert found[0].dtype == np.float32 and found[0].shape == ()
    assert found[1].dtype == np.dtype(dtype)
    assert float(found[0]) == pytest.approx(scale, rel=1e-6)
    assert int(found[1]) == zero


def test_scales_per_channel_are_those_of_each_channel():
    channels = ((-1.0, 2.0), (0.0, 0.0), (-8.0, 3.0))
    scale, zero = scale_zero_point(Range(-8, 3, "minmax", channels), np.uint8, False, per_channel=True)
    alone = [scale_zero_point(Range(*c, "minmax"), np.uint8, False) for c in channels]
    assert scale.tolist() == [float(s) for s, _ in alone]
    assert zero.tolist() == [int(z) for _, z in alone]
    with pytest.raises(InputError, match="no channels"):
        scale_zero_point(Range(-8, 3, "minmax"), np.uint8, False, per_channel=True)


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, None), (np.int8, 9), (np.int8, 1)])
def test_types_that_cannot_hold_the_integers_are_refused(dtype, bits):
    with pytest.raises(InputError):
        scale_zero_point(Range(-1, 1, "minmax"), dtype, bits=bits)


@given(st.floats(-100, 0), st.floats(0.01, 100), st.booleans(), st.sampled_from([np.int8, np.uint8]))
def test_zero_is_exact_and_the_ends_are_within_a_step(low, high, symmetric, dtype):
    scale, zero = scale_zero_point(Range(low, high, "minmax"), dtype, symmetric)
    info, step = np.iinfo(dtype), float(scale)
    assert info.min <= int(zero) <= info.max
    for end in (low, high):
        code = np.clip(np.rint(end / step) + int(zero), info.min, info.max)
        assert abs((code - int(zero)) * step - end) <= step * 1.001


# -- observers ---------------------------------------------------------------------------------------------------------

VALUES = hnp.arrays(
    np.float32, st.integers(1, 60),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | st.just(0.0),
)  # fmt: skip


@given(st.lists(VALUES, min_size=1, max_size=6), st.randoms())
def test_statistics_depend_neither_on_order_nor_on_batches(parts, random):
    whole = stats(np.concatenate(parts))
    random.shuffle(parts)
    observer = Observer()
    for part in parts:
        observer.add(part)
    assert exactly(observer.statistics()) == exactly(whole)


@given(VALUES)
def test_the_histogram_is_the_naive_one(values):
    found = stats(values)
    assert (found.low, found.high, found.count) == (values.min(), values.max(), values.size)
    assert found.histogram is not None
    width = found.histogram.width
    assert math.frexp(width)[0] == 0.5, "a power of two"
    naive = np.zeros(4095, np.int64)
    for value in values.astype(np.float64):
        naive[math.trunc(value / width) + 2047] += 1
    assert found.histogram.counts.tolist() == naive.tolist()
    peak = float(np.abs(values).max())
    if peak > 2.0**-100:
        assert 1024 * width <= peak < 2048 * width, "between 1024 and 2048 bins are used"


@given(st.lists(VALUES, min_size=2, max_size=5))
def test_an_observer_can_be_resumed_anywhere(parts):
    observer = Observer()
    for part in parts:
        kept = json.loads(json.dumps(calibration._encode(calibration._Key("t", None, True), observer.statistics())))
        observer = Observer.resumed(calibration._decode(kept), None)
        observer.add(part)
    assert exactly(observer.statistics()) == exactly(stats(np.concatenate(parts)))


def test_channels_have_extremes_of_their_own():
    parts = [images(2, seed) for seed in range(3)]
    observer = Observer(histogram=False, axis=-3)
    for part in parts:
        observer.add(part)
    whole = np.concatenate(parts)
    assert observer.statistics().per_channel == tuple(
        (float(whole[:, c].min()), float(whole[:, c].max())) for c in range(3)
    )
    with pytest.raises(InputError, match="4 channels in one sample and 3 in another"):
        observer.add(images(1, 0, (4, 16, 16)))
    with pytest.raises(InputError, match="no axis 4"):
        Observer(axis=4).add(parts[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    for observer in (Observer(), Observer(histogram=False)):
        observer.add(np.ones(5, np.float32))
        with pytest.raises(ValueError, match="not finite"):
            observer.add(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_point_types_count_as_float32(dtype):
    values = RNG.standard_normal(1000).astype(dtype)
    assert exactly(stats(values)) == exactly(stats(values.astype(np.float32)))


# -- solvers -----------------------------------------------------------------------------------------------------------

NORMAL = RNG.standard_normal(200_000).astype(np.float32)
OUTLIER = np.append(NORMAL, np.float32(60))
RELU = np.maximum(OUTLIER, 0)


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("values", [NORMAL, OUTLIER, RELU, NORMAL + 20], ids=["normal", "outlier", "relu", "shifted"])
def test_percentiles_are_those_of_the_values_to_within_a_bin(values, percentile):
    one = stats(values)
    assert one.histogram is not None
    width = one.histogram.width
    share = percentile / 100
    both = one.range("percentile", percentile=percentile)
    for end, q in ((both.low, (1 - share) / 2), (both.high, (1 + share) / 2)):
        assert end == pytest.approx(np.quantile(values, q, method="inverted_cdf"), abs=1.01 * width)
    assert np.mean((values >= both.low) & (values <= both.high)) >= share - 1e-9
    one_sided = one.range("percentile", percentile=percentile, symmetric=True)
    wanted = np.quantile(np.abs(values), share, method="inverted_cdf")
    assert max(-one_sided.low, one_sided.high) == pytest.approx(wanted, abs=1.01 * width)


@pytest.mark.parametrize("percentile", [50, 100.1, -1])
def test_percentiles_out_of_range_are_refused(percentile):
    with pytest.raises(InputError, match="out of range"):
        stats(NORMAL).range("percentile", percentile=percentile)


def naive_divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """Straight from the definition, one window, bin by bin."""
    window = counts[start:stop].astype(float)
    if 2 * window.sum() < counts.sum():
        return math.inf  # it clips more than it holds
    reference = window.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    size = stop - start
    quantised = np.zeros(size)
    for level in range(levels):
        bins = [j for j in range(size) if j * levels // size == level]
        occupied = [j for j in bins if reference[j]]
        for j in occupied:
            quantised[j] = max(window[bins].sum(), 1e-4) / len(occupied)
    p, q = reference / reference.sum(), quantised / window.sum()
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a)


def test_the_divergence_is_the_naive_one():
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.uniform(0, 3, 64) ** 3).astype(float)
    windows = [(a, b) for a, b in itertools.product(range(0, 30, 7), range(40, 65, 3))]
    starts, stops = np.array(windows).T
    for levels in (4, 8, 10):
        found = calibration._Divergence(counts)(starts, stops, levels)
        naive = [naive_divergence(counts, a, b, levels) for a, b in windows]
        np.testing.assert_allclose(found, naive, rtol=1e-9, atol=1e-12)
        assert len(set(found.tolist())) > 10 and np.isinf(found).any()


@pytest.mark.parametrize("method", ["entropy", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_lone_outlier_is_clipped_and_an_even_spread_is_not(method, symmetric):
    for values in (OUTLIER, RELU):
        one = stats(values).range(method, symmetric=symmetric)
        assert 2.5 < one.high < 58
        assert one.low <= (0 if values is RELU else -2.5)
        assert one.low >= values.min()
    even = stats(np.linspace(-1, 1, 100_001, dtype=np.float32)).range(method, symmetric=symmetric)
    assert even.low < -0.97
    assert even.high > 0.97


def squared_error(values: np.ndarray, interval: Range, symmetric: bool, bits: int = 8) -> float:
    dtype = np.int8 if symmetric else np.uint8
    scale, zero = scale_zero_point(interval, dtype, symmetric, bits=bits)
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    codes = np.clip(np.rint(values.astype(np.float64) / scale) + zero, low, high)
    return float(np.mean(((codes - zero) * scale - values) ** 2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("values", [OUTLIER, RELU, NORMAL**3, np.exp(NORMAL)], ids=["outlier", "relu", "cubed", "exp"])
def test_the_squared_error_is_within_a_tenth_of_the_best(values, symmetric, bits):
    values = values[-50_001:]
    found = squared_error(values, stats(values).range("mse", symmetric=symmetric, bits=bits), symmetric, bits)
    low, high = float(values.min()), float(values.max())
    ends = [(low * f, high * g) for f, g in itertools.product(np.linspace(0.05, 1, 24), repeat=2)]
    if symmetric or low >= 0:
        ends = [(low * f, high * f) for f in np.linspace(0.02, 1, 200)]
        ends = [(max(low, -max(-a, b)), min(high, max(-a, b))) for a, b in ends]
    best = min(squared_error(values, Range(a, b, ""), symmetric, bits) for a, b in ends)
    assert found <= 1.1 * best
    if bits < 8:
        assert found < 0.9 * squared_error(values, stats(values).range("minmax"), symmetric, bits)


@pytest.mark.parametrize("method", calibration.METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("values", [[0.0], [5.0], [-5.0], [0, 5], [-3, 5], [1e-40], [5, 6], [-6, -5], [-1e-3, 1e3]])
def test_few_values_keep_their_range(method, symmetric, values):
    """Nothing can be won by clipping one or two values that are as frequent."""
    one = stats(np.array(values, np.float32)).range(method, symmetric=symmetric)
    low, high = np.float32(min(values)), np.float32(max(values))
    assert low <= one.low <= one.high <= high
    assert max(-one.low, one.high) >= 0.99 * max(-low, high) or len(values) > 1
    assert math.isfinite(float(scale_zero_point(one)[0]))


def test_unknown_methods_and_missing_histograms_are_refused():
    with pytest.raises(InputError, match="no calibration method 'kl'"):
        stats(NORMAL).range("kl")
    with pytest.raises(InputError, match="9 bits"):
        stats(NORMAL).range("mse", bits=9)
    extremes = Statistics(-1, 1, 5)
    assert extremes.range("minmax") == Range(-1, 1, "minmax")
    with pytest.raises(InputError, match="needs a histogram"):
        extremes.range("mse")


# -- graphs ------------------------------------------------------------------------------------------------------------


def whole_data(graph: Graph, batches, tensors) -> dict[str, np.ndarray]:
    """Every value of each tensor, all at once."""
    tapped = graph.copy()
    known = tapped.tensors()
    computed = [t for t in tensors if t != "x"]
    tapped.outputs = [known[t] for t in computed]
    runs = [oracle.run(tapped, {"x": b}) for b in batches]
    return {"x": np.concatenate(batches)} | {t: np.concatenate([r[t] for r in runs]) for t in computed}


def test_the_statistics_are_those_of_all_data_at_once():
    graph, batches = convnet(), list(images(7)[:, None])
    found = observe(graph, data(graph, batches), TENSORS)
    assert found.samples == 7
    assert list(found.statistics) == list(TENSORS)
    for name, values in whole_data(graph, batches, TENSORS).items():
        one = found.statistics[name]
        assert one.count == values.size, name
        assert (one.low, one.high) == pytest.approx((float(values.min()), float(values.max())), rel=1e-5, abs=1e-6)
        assert one.histogram is not None
        edges = np.array([i for i in range(-2048, 2049) if i]) * one.histogram.width
        naive = np.histogram(values, edges)[0]
        # Rounding may move a value that lies on an edge into the next bin.
        assert np.abs(one.histogram.counts - naive).sum() <= 0.01 * values.size, name
        assert np.count_nonzero(naive) > 4


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(8)), st.lists(st.integers(1, 4), min_size=8, max_size=8), st.sampled_from([0, 3]))
def test_ranges_depend_neither_on_the_order_nor_on_the_batches_of_the_data(order, sizes, seed):
    graph, every = convnet(), images(8, seed)
    alone = observe(graph, data(graph, list(every[:, None])), TENSORS, axes={"r1": 1})
    shuffled, batches = every[list(order)], []
    for size in sizes:
        batches.append(shuffled[:size])
        shuffled = shuffled[size:]
    again = observe(graph, data(graph, [b for b in batches if len(b)]), TENSORS, axes={"r1": 1})
    assert again.samples == 8
    for name in TENSORS:
        assert exactly(again.statistics[name]) == exactly(alone.statistics[name]), name
        for method in calibration.METHODS:
            assert again.statistics[name].range(method) == alone.statistics[name].range(method)


def test_minmax_equals_the_calibrator_of_onnx_runtime(tmp_path):
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    graph, every = convnet(), images(5)

    class Reader(calibrate.CalibrationDataReader):
        def __init__(self):
            self._rest = iter(every[:, None])

        def get_next(self):
            return next(({"x": x} for x in self._rest), None)

    graph.save(tmp_path / "m.onnx")
    theirs = calibrate.create_calibrator(tmp_path / "m.onnx", augmented_model_path=str(tmp_path / "a.onnx"))
    theirs.collect_data(Reader())
    expected = {name: value.range_value for name, value in theirs.compute_data().items()}
    names = [n for n in TENSORS if n in expected]
    assert len(names) >= 6
    ours = collect(graph, data(graph, list(every[:, None])), names, "minmax")
    for name in names:
        low, high = (float(np.squeeze(end)) for end in expected[name])
        assert (ours[name].low, ours[name].high) == pytest.approx((low, high), rel=1e-5, abs=1e-6)


def test_collect_gives_what_observe_and_range_give():
    graph, batches = convnet(), list(images(4)[:, None])
    options = {"symmetric": True, "bits": 7}
    ranges = collect(graph, data(graph, batches), ("c1", "a"), "mse", **options)
    statistics = observe(graph, data(graph, batches), ("c1", "a")).statistics
    assert dict(ranges) == {n: s.range("mse", **options) for n, s in statistics.items()}
    assert (ranges.samples, ranges.random, len(ranges)) == (4, False, 2)
    plain = collect(graph, [{"x": b} for b in batches], ("c1", "a"), "mse", **options)
    assert dict(plain) == dict(ranges)
    assert collect(graph, open_data("random:2", graph.signature().inputs), ["a"]).random


def test_what_only_moves_values_is_observed_where_they_come_from():
    graph = convnet()
    assert calibration._resolve(graph, ["f", "p", "y"], {}) == {"f": ("p", None), "p": ("p", None), "y": ("y", None)}
    assert calibration._resolve(graph, ["f"], {"f": 1}) == {"f": ("f", 1)}, "an axis is the tensor's own"
    found = observe(graph, data(graph, list(images(2)[:, None])), ["p"], axes={"f": 1}).statistics
    assert exactly(found["f"]) != exactly(found["p"])
    assert len(found["f"].per_channel or ()) == 8
    assert found["p"].per_channel is None


# -- memory ------------------------------------------------------------------------------------------------------------


def runner(graph: Graph, feeds, tensors, memory: int) -> calibration._Runner:
    return calibration._Runner(graph, feeds, tensors, memory, 1)


def test_little_memory_cuts_the_graph_and_changes_nothing():
    graph, batches = convnet(("n", 3, 64, 64)), list(images(3, 0, (3, 64, 64))[:, None])
    weights, plane = 2 * graph.weight_bytes() + len(TENSORS) * calibration._STATE, 64 * 64 * 4
    feeds = batches[0].nbytes
    whole = runner(graph, {"x": batches[0]}, TENSORS, 1 << 30)
    assert len(whole.segments) == 1
    least = weights + feeds + (3 * 8) * plane + 8 * 4  # the addition reads two tensors and writes one
    cut = runner(graph, {"x": batches[0]}, TENSORS, least)
    assert len(cut.segments) >= 3
    held = []
    for segments in (whole, cut):
        sizes = {}
        for segment in segments.segments:
            run = segment.session.run
            alive = {"x": batches[0], **{n: np.zeros(sizes[n], np.float32) for n in segment.reads if n != "x"}}
            outputs = run(segment.gives, {n: alive[n] for n in segment.reads})
            sizes |= {n: o.shape for n, o in zip(segment.gives, outputs, strict=True)}
            held.append(sum(o.nbytes for o in outputs))
        held[-len(segments.segments) :] = [max(held[-len(segments.segments) :])]
    assert held[1] <= held[0] / 2
    ours = observe(graph, data(graph, batches), TENSORS, memory=least).statistics
    for name, one in observe(graph, data(graph, batches), TENSORS).statistics.items():
        assert (one.low, one.high) == pytest.approx((ours[name].low, ours[name].high), rel=1e-5, abs=1e-6)
        assert one.count == ours[name].count
    with pytest.raises(InputError, match=r"0 MiB are too little to calibrate .* residual needs 1 MiB"):
        runner(graph, {"x": batches[0]}, TENSORS, least - 8 * plane)


def test_memory_does_not_grow_with_the_data():
    graph = convnet(("n", 3, 64, 64))

    def peak(count: int) -> int:
        samples = ({"x": x[None]} for i in range(count) for x in images(1, i, (3, 64, 64)))
        tracemalloc.start()
        observe(graph, samples, TENSORS)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(2)
    assert peak(40) <= 1.05 * peak(4)


def test_subgraphs_read_across_a_cut():
    """What a branch of an If reads from outside must enter the segment that holds the If."""
    big = helper.make_graph(
        [helper.make_node("Mul", ["c1", "two"], ["t"])], "t", [], [helper.make_tensor_value_info("t", 1, None)]
    )
    small = helper.make_graph(
        [helper.make_node("Identity", ["c1"], ["e"])], "e", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["c1"]),
        helper.make_node("Neg", ["c1"], ["c2"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=big, else_branch=small),
    ]
    graph = model(nodes, {"two": np.float32(2), "zero": np.float32(0)})
    inputs = [np.full((1, 3, 16, 16), v, np.float32) for v in (3, 1)]
    for memory in (1 << 20, 5 * inputs[0].nbytes + 3 * calibration._STATE):
        found = observe(graph, data(graph, inputs), ["c1", "c2", "y"], memory=memory).statistics
        assert (found["y"].low, found["y"].high) == (2, 6)
        assert (found["c2"].low, found["c2"].high) == (-3, -1)


# -- what must be refused ----------------------------------------------------------------------------------------------


def test_tensors_that_cannot_be_calibrated_are_named():
    graph, batches = convnet(), list(images(1)[:, None])
    with pytest.raises(InputError, match=r"no tensor 'c1x'; did you mean 'c1'"):
        observe(graph, data(graph, batches), ["c1x"])
    with pytest.raises(InputError, match="'w1' is a weight"):
        observe(graph, data(graph, batches), ["w1"])
    shape = model([helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Relu", ["x"], ["y"])], outputs=("y",))
    with pytest.raises(InputError, match="'s' is int64"):
        observe(shape, data(shape, batches), ["s"])


def test_an_activation_that_overflows_is_named_with_its_sample():
    graph = model([helper.make_node("Exp", ["x"], ["y"])])
    fine, hot = images(1)[:, :], np.full((1, 3, 16, 16), 100, np.float32)
    assert observe(graph, data(graph, [fine, fine]), ["y"]).samples == 2
    with pytest.raises(InputError, match="'y' is not finite on sample 1"):
        observe(graph, data(graph, [fine, hot]), ["y"])


def test_no_data_and_empty_tensors_are_errors_and_one_image_is_enough():
    graph = convnet()
    with pytest.raises(InputError, match="no calibration data"):
        observe(graph, [], ["a"])
    with pytest.raises(InputError, match="no calibration data"):
        observe(graph, data(graph, []), ["a"])
    assert observe(graph, data(graph, images(1)), ["a"]).samples == 1
    nodes = [helper.make_node("Slice", ["x", "zero", "zero"], ["y"])]
    nothing = model(nodes, {"zero": np.zeros(1, np.int64)})
    with pytest.raises(InputError, match="'y' is empty on every sample"):
        observe(nothing, data(nothing, images(1)), ["y"])


def test_constant_and_all_zero_tensors_have_a_range_and_a_scale():
    nodes = [helper.make_node("Mul", ["x", "zero"], ["z"]), helper.make_node("Add", ["z", "five"], ["y"])]
    graph = model(nodes, {"zero": np.float32(0), "five": np.float32(5)})
    for method in calibration.METHODS:
        ranges = collect(graph, data(graph, images(3)), ["z", "y"], method)
        assert (ranges["z"].low, ranges["z"].high) == (0, 0)
        assert (ranges["y"].low, ranges["y"].high) == (5, 5)
        assert float(scale_zero_point(ranges["z"])[0]) == 1
        assert float(scale_zero_point(ranges["y"])[0]) == pytest.approx(5 / 127)


# -- cache -------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for Ctrl-C."""


def test_a_second_call_reads_the_cache_and_damage_is_noticed(tmp_path):
    graph, batches = convnet(), list(images(4)[:, None])
    log: list[int] = []

    def again(tensors=TENSORS, **options):
        log.clear()
        return observe(graph, data(graph, batches), tensors, cache=tmp_path / "c", progress=lambda n, _: log.append(n),
                       **options)  # fmt: skip

    first = again(axes={"r1": 1})
    assert log == [1, 2, 3, 4]
    second = again(axes={"r1": 1})
    assert log == []
    assert second.samples == 4
    assert {n: exactly(s) for n, s in second.statistics.items()} == {n: exactly(s) for n, s in first.statistics.items()}
    again(histograms=False)
    assert log == [1, 2, 3, 4], "r1 was only observed with an axis"
    again(histograms=False)
    assert log == []
    again()
    assert log == [1, 2, 3, 4], "of r1 only the extremes are known"
    (file,) = (tmp_path / "c").iterdir()
    file.write_text(file.read_text().replace('"samples": 4', '"samples": 5'))
    assert again().samples == 4
    assert log == [1, 2, 3, 4]
    file.write_bytes(file.read_bytes()[:100])
    again()
    assert log == [1, 2, 3, 4]


def test_another_graph_or_other_data_is_another_entry(tmp_path):
    graph, batches = convnet(), list(images(2)[:, None])
    observe(graph, data(graph, batches), ["a"], cache=tmp_path)
    other = convnet()
    other.nodes[0].inputs[2].values = other.nodes[0].inputs[2].values + 1
    changed = observe(other, data(other, batches), ["a"], cache=tmp_path).statistics["a"]
    assert exactly(changed) == exactly(observe(other, data(other, batches), ["a"]).statistics["a"])
    observe(graph, data(graph, list(images(2, 9)[:, None])), ["a"], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_run_is_resumed_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_SAVE_SECONDS", 0)
    graph, batches = convnet(), list(images(6)[:, None])

    def stop(done: int, _) -> None:
        if done == 4:
            raise Stopped

    with pytest.raises(Stopped):
        observe(graph, data(graph, batches), TENSORS, cache=tmp_path, progress=stop)
    ran: list[str] = []
    run = calibration._Runner.run
    monkeypatch.setattr(
        calibration._Runner, "run", lambda self, label, *rest: (ran.append(label), run(self, label, *rest))
    )
    resumed = observe(graph, data(graph, batches), TENSORS, cache=tmp_path)
    assert ran == ["sample 3", "sample 4", "sample 5"]
    assert resumed.samples == 6
    whole = observe(graph, data(graph, batches), TENSORS)
    assert {n: exactly(s) for n, s in resumed.statistics.items()} == {
        n: exactly(s) for n, s in whole.statistics.items()
    }
    ran.clear()
    observe(graph, data(graph, batches), TENSORS, cache=tmp_path)
    assert ran == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    graph = convnet()
    with pytest.raises(InputError, match="cannot write"):
        observe(graph, data(graph, images(1)), ["a"], cache=tmp_path / "file" / "c")


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGECOMPILE_CACHE", str(tmp_path))
    assert calibration.cache_folder() == tmp_path / "calibration"


def test_magnitudes_add_the_bins_of_both_signs():
    counts = np.zeros(4095, np.int64)
    counts[[2047 - 4, 2047 - 3, 2047, 2047 + 3, 4094]] = 1, 2, 3, 5, 7
    found = Histogram(0.5, counts).magnitudes()
    assert {i: int(found[i]) for i in np.flatnonzero(found)} == {0: 3, 3: 7, 4: 1, 2047: 7}


@pytest.mark.parametrize("low", [0.0, 0.2, -0.8])
def test_entropy_does_not_clip_values_that_all_lie_far_from_zero(low):
    values = np.random.default_rng(0).uniform(low, low + 0.6, 20000).astype(np.float32)
    observer = Observer(True)
    observer.add(values)
    found = observer.statistics().range("entropy")
    assert found.low < low + 0.03 and found.high > low + 0.57


def test_no_test_uses_the_cache_of_the_user(monkeypatch):
    own = Path(platformdirs.user_cache_dir("edgecompile"))
    assert own not in calibration.cache_folder().parents
    monkeypatch.delenv("EDGECOMPILE_CACHE")
    assert own in calibration.cache_folder().parents
