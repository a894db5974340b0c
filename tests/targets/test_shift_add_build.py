"""Models with coded weights, built from end to end for each target."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgecompile
from edgecompile import oracle
from edgecompile.graph import Graph

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
        str(path), target=target, passes=PASSES[target], output=tmp_path / "b", bench=False, options={"threads": 1}
    )
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


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT would build the engine")
def test_a_bundle_for_tensorrt_has_float_weights(path, tmp_path):
    edgecompile.build(str(path), target="trt", passes=PASSES["trt"], output=tmp_path / "b", bench=False)
    graph = Graph.load(tmp_path / "b" / "model.onnx")
    assert not [n for n in graph.nodes if n.domain] and not graph.function_protos
    assert {t.values.dtype.name for t in graph.tensors().values() if hasattr(t, "values")} <= {"float32", "int64"}
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert not any(manifest["problems"].values())
