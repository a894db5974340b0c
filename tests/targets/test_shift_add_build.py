"""Models with coded weights, built from end to end for each target."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgecompile
from edgecompile import driver, frontend, oracle
from edgecompile.errors import ParityError
from edgecompile.graph import Graph
from edgecompile.passes.shift_add import codes, ops
from edgecompile.targets.tvm import TvmTarget

PASSES = {
    "ort": "clean,shift_add{code=pot,group=0}",
    "tvm": "clean,shift_add{code=pot,group=0},legalize{target=tvm},clean",
    "trt": "clean,shift_add,legalize{target=trt},clean",
}


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "pointwise": rng.standard_normal((24, 8, 1, 1)).astype(np.float32),
        "one": rng.standard_normal((24, 40)).astype(np.float32),
        "two": rng.standard_normal((40, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "pointwise"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "one"], ["m"]),
        helper.make_node("Relu", ["m"], ["s"]),
        helper.make_node("MatMul", ["s", "two"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 8, 6, 6]), ("y", [1, 10]))]
    held = [numpy_helper.from_array(v, n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("target", ["ort", "tvm"])
def test_an_engine_computes_what_the_passes_left(target, path, tmp_path):
    if target == "tvm":
        pytest.importorskip("tvm")
    bundle = edgecompile.build(
        str(path), target=target, passes=PASSES[target], output=tmp_path / "b", bench=False,
        options={"threads": 1, **({"custom_ops": "no"} if target == "ort" else {})},
    )  # fmt: skip
    graph = Graph.load(tmp_path / "b" / "model.onnx")
    assert sum(n.domain == "ai.edgecompile" for n in graph.nodes) == 3
    feeds = oracle.random_feeds(graph.signature().inputs, 5)
    found, coded, plain = bundle.engine().run(feeds)["y"], oracle.run(graph, feeds)["y"], Graph.load(path)
    np.testing.assert_allclose(found, coded, atol=1e-4 * np.abs(coded).max())
    # The codes are an approximation, and the report does not hide that it was not compared with the source.
    assert np.abs(found - oracle.run(plain, feeds)["y"]).max() > 1e-3 * np.abs(coded).max()
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert not report["parity"]["of_source"] and "shift_add" in report["parity"]["reference"]
    assert report["verdict"][0]["text"].startswith("Not the same function: shift_add")


@pytest.fixture
def coded(tmp_path):
    """A layer of coded weights, so large that rounded activations pay."""
    rng = np.random.default_rng(0)
    held = {
        "planes": codes.pack(rng.integers(0, 16, (512, 512)).astype(np.uint8), 4),
        "exponents": np.zeros((512, 1), np.int8),
        "levels": codes.book("pot", 4),
    }
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 512]) for n in "xy"]
    node = helper.make_node("ShiftLinear", ["x", *held], ["y"], domain=ops.DOMAIN, columns=512, group=512)
    weights = [numpy_helper.from_array(v, n) for n, v in held.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    body, made = helper.make_graph([node], "g", ports[:1], ports[1:], weights), [ops.function("ShiftLinear", 17)]
    onnx.save(helper.make_model(body, opset_imports=opsets, functions=made, ir_version=9), tmp_path / "coded.onnx")
    return tmp_path / "coded.onnx"


def compiled(path, output, target, options, min_snr=None):
    """The report of a build without passes."""
    chosen = driver.Options(target, passes="", bench=False, target_options={"threads": 1, **options}, min_snr=min_snr)
    driver.build(frontend.load(str(path), folder=path.parent), output, chosen)
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("target", [pytest.param("ort", marks=pytest.mark.slow), "tvm"])
def test_what_rounded_activations_cost_is_said_first_and_has_a_budget(target, coded, tmp_path):
    if target == "tvm":
        pytest.importorskip("tvm")
    options = {"activations": "int8", **({"custom_ops": "yes"} if target == "ort" else {})}
    report = compiled(coded, tmp_path / "b", target, options)
    parity = report["parity"]
    (error,) = parity["outputs"].values()
    assert 1e-4 < error["max_rel"] < 5e-2 and 30 < error["snr_db"] < 60
    assert parity["approximated"] == "activations=int8" and parity["min_snr"] == 20 and parity["ok"]
    first, second, *_ = (line["text"] for line in report["verdict"])
    assert (
        first == f"Not the same function: the option activations=int8 left an output of the engine at "
        f"{error['snr_db']:.0f} dB."
    )
    assert second.startswith("The engine keeps the budget of activations=int8: 20 dB")
    with pytest.raises(ParityError, match="dB, not 60 dB"):
        compiled(coded, tmp_path / "c", target, options, 60.0)
    assert not (tmp_path / "c").exists()


def damaged(factor):
    """A build of the target tvm whose engine has scales that are off."""
    right = TvmTarget.build

    def build(self, graph, folder, options, say=None):
        wrong = graph.copy()
        for node in wrong.nodes:
            levels = wrong.constant(node.inputs[3])
            node.inputs[3] = wrong.new_constant("wrong", (levels * np.float32(factor)).astype(np.float32))
        return right(self, wrong, folder, options, say)

    return build


@pytest.mark.parametrize(
    ("factor", "options", "why"),
    [(1.005, {}, "1e-04 is allowed"), (1.3, {"activations": "int8"}, "10.* dB, not 20 dB")],
)
def test_a_wrong_engine_is_refused_with_and_without_a_budget(factor, options, why, coded, tmp_path, monkeypatch):
    pytest.importorskip("tvm")
    monkeypatch.setattr(TvmTarget, "build", damaged(factor))
    with pytest.raises(ParityError, match=why):
        compiled(coded, tmp_path / "b", "tvm", options)


def test_an_option_that_rounds_nothing_has_no_budget(coded, path, tmp_path):
    pytest.importorskip("tvm")
    target, given = TvmTarget(), {"activations": "int8"}
    assert target.approximates(Graph.load(coded), given) == "activations=int8"
    assert target.approximates(Graph.load(path), given) == target.approximates(Graph.load(coded), {}) == ""
    options = {**given, "schedules": "no"}  # which leaves no kernel that could round
    parity = compiled(coded, tmp_path / "b", "tvm", options)["parity"]
    assert parity["approximated"] == "" and parity["min_snr"] is None and parity["tolerance"] == 1e-4


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT would build the engine")
def test_a_bundle_for_tensorrt_has_float_weights(path, tmp_path):
    edgecompile.build(str(path), target="trt", passes=PASSES["trt"], output=tmp_path / "b", bench=False)
    graph = Graph.load(tmp_path / "b" / "model.onnx")
    assert not [n for n in graph.nodes if n.domain] and not graph.function_protos
    assert {t.values.dtype.name for t in graph.tensors().values() if hasattr(t, "values")} <= {"float32", "int64"}
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert not any(manifest["problems"].values())
