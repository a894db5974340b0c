"""The pass quantize: what it writes, what it says, what it leaves alone; on small networks and on MobileNetV2."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

from edgecompile import calibration, oracle, qdq, sensitivity
from edgecompile.calibration_data import CalibrationData, open_data
from edgecompile.errors import InputError
from edgecompile.graph import Graph, provenance
from edgecompile.passes import quantize
from edgecompile.passes.quantize import Quantize
from edgecompile.pipeline import Context, Drop, PassResult, Pipeline
from edgecompile.sensitivity import Evidence

pytest.importorskip("onnxruntime")

DATA = Path(os.environ.get("EDGECOMPILE_DATA", "../shared/data"))
NET = "(float[1,4,8,8] x) => (float[1,5] y) { a = Conv <pads=[1,1,1,1]> (x, w, b) r = Relu (a) c = Conv <group=6, pads=[1,1,1,1]> (r, v) d = Relu (c) e = Conv (d, s) g = Relu (e) p = GlobalAveragePool (g) f = Flatten (p) y = Gemm <transB=1> (f, u, t) }"  # noqa: E501
VIT = "(float[4,16] x) => (float[4,6] y) { a = MatMul (x, w) n = LayerNormalization (a, g, h) q = MatMul (n, v) k = Transpose (q) s = MatMul (q, k) p = Softmax (s) o = MatMul (p, q) m = MatMul (o, u) y = MatMul (m, t) }"  # noqa: E501


def graph_of(text: str, opset: int = 17, **weights: np.ndarray) -> Graph:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in weights.items())
    return Graph.from_proto(model)


def net(opset: int = 17) -> Graph:
    rng = np.random.default_rng(0)
    return graph_of(
        NET, opset, w=rng.standard_normal((6, 4, 3, 3)), b=rng.standard_normal(6), v=rng.standard_normal((6, 1, 3, 3)),
        s=rng.standard_normal((8, 6, 1, 1)), u=rng.standard_normal((5, 8)), t=rng.standard_normal(5),
    )  # fmt: skip


def vit() -> Graph:
    rng = np.random.default_rng(0)
    square = {n: rng.standard_normal((16, 16)) / 4 for n in "wvu"}
    return graph_of(VIT, g=np.logspace(-1, 1, 16), h=rng.standard_normal(16), t=rng.standard_normal((16, 6)), **square)


def data(graph: Graph, count: int = 12) -> CalibrationData:
    ports = graph.signature().inputs
    return open_data([oracle.random_feeds(ports, seed) for seed in range(count)], ports)


def run(
    graph: Graph, *, limit: int | None = None, calibration: CalibrationData | None = None, evaluate=None, **options
) -> PassResult:
    context = Context(limit=limit)
    context.calibration = calibration or data(graph)  # type: ignore[attr-defined]
    context.evaluate = evaluate  # type: ignore[attr-defined]
    context.begin("quantize")
    return Quantize(**options).run(graph, context)


def level(graph: Graph, reference: Graph) -> float:
    feeds = list(data(reference).feeds())
    return qdq.snr(map(qdq.kernels(reference), feeds), map(qdq.kernels(graph), feeds))


def notes(result: PassResult) -> str:
    return "\n".join(map(str, result.notes))


def layers(graph: Graph) -> list[str]:
    """Of each layer, the operator, with a star where it reads dequantised weights."""
    return [
        n.op + "*" * bool(n.inputs[1].inputs and n.inputs[1].inputs[0].op == "DequantizeLinear")
        for n in graph.nodes
        if n.op in ("Conv", "Gemm", "MatMul")
    ]


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
@pytest.mark.parametrize("rules", ["ort_cpu", "tensorrt", "tvm"])
def test_every_method_and_table_gives_a_valid_close_model(method, rules):
    graph, reference = net(), net()
    result = run(graph, method=method, rules=rules)
    graph.check(reference.signature())
    assert layers(graph) == ["Conv*"] * 3 + ["Gemm*"] and len(result.rewrites) == 4
    assert level(graph, reference) > (20 if method != "entropy" else 12)
    assert all(provenance(n) is not None for n in graph.nodes)


def test_a_second_run_changes_nothing():
    graph = net()
    run(graph)
    before = graph.digest()
    result = run(graph)
    assert graph.digest() == before and not result.rewrites and "quantised already" in notes(result)


def test_without_data_the_build_stops_and_says_how_to_give_some():
    graph = net()
    before = graph.digest()
    context = Context()
    context.begin("quantize")
    with pytest.raises(InputError, match="--calib"):
        Quantize().run(graph, context)
    (step,) = Pipeline((Quantize(),)).run(graph).steps
    assert "calibration data" in step.failure and graph.digest() == before


def test_random_calibration_is_marked():
    graph, other = net(), net()
    assert "random numbers" in notes(run(graph, calibration=open_data("random:4", graph.signature().inputs)))
    assert "random numbers" not in notes(run(other))


def test_what_was_found_out_is_kept_and_progress_is_told(tmp_path, monkeypatch):
    reference, said, observed = net(), [], []
    real = calibration._stream
    monkeypatch.setattr(calibration, "_stream", lambda *a: (observed.append(a), real(*a))[1])

    def once(**options) -> Graph:
        graph = net()
        context = Context(calibration=data(graph), progress=said.append, cache=tmp_path)
        context.begin("quantize")
        result = Quantize(min_snr=1.0, **options).run(graph, context)
        assert result.sensitivity is not None and result.sensitivity.measured
        return graph

    first = once()
    assert len(observed) == 1 and "calibrating, sample 12" in said and "measuring what each layer costs, 100%" in said
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(kept) >= 2
    assert once().digest() == first.digest() and len(observed) == 1, "ranges come from the cache"
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert once().digest() == first.digest() and len(observed) == 2, "a damaged cache is not believed"
    once(method="minmax")
    assert len(observed) == 2, "other methods need no other statistics"
    assert reference.digest() == net().digest()


def test_an_old_opset_is_refused():
    with pytest.raises(InputError, match="opset 13"):
        run(net(11))


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_rewrites_are_layers_and_can_be_limited(limit):
    graph = net()
    result = run(graph, limit=limit)
    assert sum(x.endswith("*") for x in layers(graph)) == limit == len(result.rewrites)
    graph.check()


def test_notes_name_what_stays_in_float_and_why():
    graph = vit()
    result = run(graph)
    said = notes(result)
    for why in ("first layer", "last layer", "two activations", "scale", "more than 8 bits"):
        assert why in said
    assert layers(graph) == ["MatMul", "MatMul*", "MatMul", "MatMul", "MatMul*", "MatMul"]
    assert layers_of(vit(), ends="int8").count("MatMul*") == 4
    assert layers_of(vit(), ends="int8", skip="n,Mat*").count("MatMul*") == 0


def layers_of(graph: Graph, **options) -> list[str]:
    run(graph, **options)
    return layers(graph)


def test_norms_are_reparameterized_and_it_helps():
    plain, evened, reference = vit(), vit(), vit()
    run(plain, norms=False)
    result = run(evened)
    assert result.rewrites[0].what == "scale reparameterization"
    assert level(evened, reference) > level(plain, reference) + 1


def test_biases_are_corrected_unless_told_otherwise():
    graphs = {flag: net() for flag in (True, False)}
    for flag, graph in graphs.items():
        run(graph, bias_correction=flag, bits=7)
    biases = {
        flag: [n.inputs[2] for n in graph.nodes if n.op == "Conv" and len(n.inputs) > 2]
        for flag, graph in graphs.items()
    }
    assert len(biases[True]) == 3 and len(biases[False]) == 1  # layers without one got one
    assert level(graphs[True], net()) != level(graphs[False], net())


def test_equalize_is_an_option_and_exact_before_int8():
    graph, reference = net(), net()
    result = run(graph, equalize=True)
    assert "cross-layer equalisation" in {r.what for r in result.rewrites}
    assert level(graph, reference) > 20
    only = net()
    run(only, equalize=True, limit=2)  # both equalisations, no layer
    assert not qdq.is_quantized(only) and level(only, reference) > 100


def test_weights_are_7_bits_where_the_kernels_saturate(monkeypatch):
    """The evidence is that of a CPU whose pointwise kernels saturate; its real kernels are not at hand."""
    seen = {}

    def recorded(graph, rules, ranges, placement, feeds, **_):
        for number, node in enumerate(graph.nodes):
            if node.op in ("Conv", "Gemm"):
                bad = node.attrs.get("group", 1) == 1
                seen[number] = Evidence({8: 26.8 if bad else 42.3, 7: 39.6}, {8: 42.3, 7: 39.6})
        return seen

    monkeypatch.setattr(quantize.measure, "cpu_features", lambda: ("avx2", "fma"))
    monkeypatch.setattr(quantize.sensitivity, "evidence", recorded)
    graph = net()
    result = run(graph)
    assert notes(result).count("7-bit weights: the 8-bit kernel gives 26.8 dB where 42.3 dB were simulated") == 3
    largest = {
        n: np.abs(v.astype(int)).max() for n, v in graph.constants().items() if v.dtype == np.int8 and v.ndim > 1
    }
    assert sorted(largest.values()) == [64, 64, 64, 127]
    monkeypatch.setattr(quantize.measure, "cpu_features", lambda: ("avx2", "avx_vnni"))
    exact = net()
    assert "7-bit" not in notes(run(exact))


@pytest.mark.parametrize("bits", [7, 8])
def test_the_width_can_be_given(bits):
    graph = net()
    run(graph, bits=bits)
    stored = [np.abs(v.astype(int)).max() for v in graph.constants().values() if v.dtype == np.int8 and v.ndim > 1]
    assert set(stored) == {qdq.WEIGHT_LIMIT[bits]}


def test_a_budget_reverts_layers_and_says_which():
    graph, reference = net(), net()
    free = level_after(reference, min_snr=0.0)
    result = run(graph, min_snr=free + 3)
    assert level(graph, reference) >= free + 3 - 0.5
    assert "left in floating point to keep the budget" in notes(result)
    assert 0 < sum(x.endswith("*") for x in layers(graph)) < 4


def level_after(reference: Graph, **options) -> float:
    graph = reference.copy()
    run(graph, **options)
    return level(graph, reference)


def test_a_score_is_kept_within_its_drop():
    reference = net()
    feeds = list(data(reference).feeds())
    outputs = list(map(qdq.kernels(reference), feeds))

    def score(graph: Graph, simulate: bool) -> float:
        call = (qdq.simulation if simulate else qdq.kernels)(graph)
        return -float(np.mean([np.abs(call(f)["y"] - o["y"]).mean() for f, o in zip(feeds, outputs, strict=True)]))

    graph = net()
    assert "score" in notes(run(graph, evaluate=score, max_drop=Drop("1e9")))
    loss = -score(graph, False)
    tight = net()
    run(tight, evaluate=score, max_drop=Drop(f"{loss / 3}"))
    assert -score(tight, False) <= loss / 3
    with pytest.raises(InputError, match="needs a score"):
        run(net(), max_drop=Drop("1%"))


def test_what_an_earlier_pass_lost_of_the_score_is_not_there_to_lose_again():
    reference = net()
    feeds = list(data(reference).feeds())
    outputs = list(map(qdq.kernels(reference), feeds))

    def score(graph: Graph, _: bool) -> float:
        run = qdq.kernels(graph)
        return -float(np.mean([np.abs(run(f)["y"] - o["y"]).mean() for f, o in zip(feeds, outputs, strict=True)]))

    def quantized(graph: Graph, *seen: Graph) -> list[str]:
        context = Context(calibration=data(graph), evaluate=score)
        for one in seen:
            context.base(one)
        context.begin("quantize")
        Quantize(max_drop=Drop(f"{-score(coarse, False)}")).run(graph, context)
        return layers(graph)

    coarse = net()
    run(coarse)
    worse = net()  # by about as much as int8 costs
    weight = worse.nodes[0].inputs[1]
    values = worse.constant(weight)
    assert values is not None
    worse.nodes[0].inputs[1] = worse.new_constant("w", (values * np.float32(1.02)).astype(np.float32))
    assert score(worse, False) < score(coarse, False) < 0
    assert "Conv*" in quantized(worse.copy()), "counted from where it stands, the budget allows int8"
    assert not any(x.endswith("*") for x in quantized(worse, reference)), "counted from before, nothing is left"


def test_non_finite_outputs_are_rejected_and_noise_is_not():
    lost = oracle.compare(np.ones(3), np.array([1, np.inf, 1]))
    noisy = oracle.compare(np.ones(3), np.array([1, 2.0, 1]))
    assert "not finite" in Quantize().reject({"y": lost}, {"y": 1e-6})
    assert not Quantize().reject({"y": noisy}, {"y": 1e-6})


@pytest.mark.parametrize(
    "options",
    [{"method": "magic"}, {"rules": "cuda"}, {"bits": 4}, {"ends": "none"}, {"memory": 0}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Quantize(**options)


def test_the_spec_shows_what_differs_from_the_defaults():
    assert str(Quantize()) == "quantize"
    assert (
        str(Quantize(rules="tensorrt", skip="head.*,stem", bits=7))
        == 'quantize{rules=tensorrt,bits=7,skip="head.*,stem"}'
    )


# -- a trained network -------------------------------------------------------------------------------------------------


def photographs(count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The first images as MobileNetV2 wants them, [1, 3, 224, 224] in [-1, 1], and their labels."""
    image = pytest.importorskip("PIL.Image")
    with np.load(DATA / "imagenet_500.npz") as stored:
        jpeg, ends, labels = stored["jpeg"], stored["offsets"], stored["labels"]
    pictures = (image.open(io.BytesIO(jpeg[ends[i] : ends[i + 1]].tobytes())) for i in range(count))
    return [(np.asarray(p.convert("RGB"), np.float32) / 127.5 - 1).transpose(2, 0, 1)[None] for p in pictures], labels


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "imagenet_500.npz").is_file(), reason="EDGECOMPILE_DATA holds no ImageNet photographs")
def test_mobilenet_keeps_its_predictions():
    graph = Graph.load(DATA / "mobilenetv2_100_224_dequant.onnx")
    images, labels = photographs(250)
    feeds = [{"input": x} for x in images[::8]]
    Pipeline.parse("clean,fold_norm,reparam").run(graph, feeds[:1], verify=False, strict=True)
    reference = graph.copy()
    run(graph, calibration=open_data(feeds, graph.signature().inputs))
    before, after = (
        np.array([call({"input": x})["logits"][0, 1:].argmax() for x in images])
        for call in map(qdq.kernels, (reference, graph))
    )
    hits = (before == labels[:250]).mean() - (after == labels[:250]).mean()
    assert hits <= 0.012 and (before == after).mean() >= 0.96
    assert sensitivity.saturates(quantize.measure.cpu_features()) or level_of(graph, reference, feeds) > 20


def level_of(graph: Graph, reference: Graph, feeds) -> float:
    return qdq.snr(map(qdq.kernels(reference), feeds), map(qdq.kernels(graph), feeds))


@pytest.mark.parametrize("count", [1, 32, 33, 64, 500])
def test_samples_are_taken_from_all_of_the_data(count):
    feeds = [{"x": np.full(1, i)} for i in range(count)]
    found = [int(one["x"][0]) for one in quantize._thinned(iter(feeds))]
    steps = set(np.diff(found).tolist())
    assert len(steps) <= 1 and min(count, 16) <= len(found) <= 32
    assert found[0] == 0 and found[-1] + max(steps, default=1) >= count
